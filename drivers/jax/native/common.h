// What all kernels are made of: vectors of the widest kind, bfloat16, XLA's thread pool and results in two types.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/c_api.h"

namespace {

// Lanes and registers of the widest vectors; a tile is kWeights rows of weights by up to kRows rows of input.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kWeights = 4, kRows = 5;
#else
constexpr int kLanes = 8, kWeights = 3, kRows = 4;
#endif

// How far ahead weights are fetched.
constexpr int64_t kAhead = 1 << 15;

typedef float Floats __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2)));
typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));

struct bfloat16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
inline float widen(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, bfloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out->bits = nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Halves narrow(Floats x) {
  Ints bits = Ints(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded, Halves);
}

inline Floats load(const float* x) { return *reinterpret_cast<const Floats*>(x); }
inline Floats load(const bfloat16* x) {
#if defined(__AVX512F__)
  __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(__AVX2__)
  __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
  return Floats(__builtin_convertvector(*reinterpret_cast<const Halves*>(x), Ints) << 16);
#endif
}
inline Floats load(const int8_t* x) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
#else
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(x), Floats);
#endif
}

inline void store(Floats x, float* out) { std::memcpy(out, &x, sizeof(x)); }
inline void store(Floats x, bfloat16* out) {
#if defined(__AVX512BF16__)
  __m256bh halves = _mm512_cvtneps_pbh(__m512(x));
#else
  Halves halves = narrow(x);
#endif
  std::memcpy(out, &halves, sizeof(halves));
}

// Has the line that lies ``bytes`` behind x in the second-level cache soon: rows of weights are too short for the
// processor to read ahead by itself.
inline void fetch(const void* x, int64_t bytes) { __builtin_prefetch(static_cast<const char*>(x) + bytes, 0, 2); }

inline float total(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
#endif
}

inline float largest(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, x[i]);
  return most;
#endif
}

// exp for x <= 88, as in Cephes: 2^n times a polynomial of the rest. Not a number stays so.
inline Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  Floats shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
  Floats n = shifted - 12582912.0f;
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * Floats((Ints(shifted) - 0x4b400000 + 127) << 23);
}

// --- threads -------------------------------------------------------------------------------------------------

// The threads of the pool that runs the call.
struct Pool {
  const XLA_FFI_Api* api;
  XLA_FFI_ExecutionContext* context;

  int64_t size() const {
    int64_t threads = 1;
    XLA_FFI_ThreadPool_NumThreads_Args args{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, context, &threads};
    return forget(api->XLA_FFI_ThreadPool_NumThreads(&args)) ? threads : 1;
  }

  template <typename Task>
  void run(const Task& task) const {
    auto call = [](void* data) {
      std::unique_ptr<Task> mine(static_cast<Task*>(data));
      (*mine)();
    };
    auto* copy = new Task(task);
    XLA_FFI_ThreadPool_Schedule_Args args{XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, context, call, copy};
    if (!forget(api->XLA_FFI_ThreadPool_Schedule(&args))) delete copy;
  }

  bool forget(XLA_FFI_Error* error) const {
    if (!error) return true;
    XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
    api->XLA_FFI_Error_Destroy(&args);
    return false;
  }
};

// Where in its share of the work each thread is, and how much of all of it is done.
struct Job {
  static constexpr int kMost = 64;
  struct alignas(64) Share {
    std::atomic<int64_t> next, end;
  };
  Share shares[kMost];
  std::atomic<int64_t> done{0};
};

// Runs work(0) .. work(count - 1) on the pool and on this thread. Each begins with a share of its own, so that it
// goes through memory in order, and then takes from the others'. A helper that comes late finds nothing left to
// take, and then no longer touches ``work``.
template <typename Work>
void spread(const Pool& pool, int64_t count, bool small, const Work& work) {
  int64_t threads = small ? 1 : std::min<int64_t>({pool.size(), count, Job::kMost});
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  auto job = std::make_shared<Job>();
  for (int64_t i = 0; i < threads; ++i) {
    job->shares[i].next = i * count / threads;
    job->shares[i].end = (i + 1) * count / threads;
  }
  auto take = [job, threads, &work](int64_t own) {
    for (int64_t other = 0; other < threads; ++other) {
      Job::Share& share = job->shares[(own + other) % threads];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
        work(i);
        job->done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  for (int64_t i = 1; i < threads; ++i) pool.run([take, i] { take(i); });
  take(0);
  for (int spins = 0; job->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 4096) std::this_thread::yield();
  }
}

// --- pages ---------------------------------------------------------------------------------------------------

// A cache of pages, the queries that attend over it, ``group`` heads for each key head, and how they score.
struct Paged {
  int64_t pages, kv_heads, page_tokens, head_dim, group, width;
  float scale, cap;
  int64_t window;
};

// --- results -------------------------------------------------------------------------------------------------

struct Output {
  void* data;
  bool wide;

  void put(int64_t at, float x) const {
    if (wide) {
      static_cast<float*>(data)[at] = x;
    } else {
      narrow(x, static_cast<bfloat16*>(data) + at);
    }
  }
};

}  // namespace
