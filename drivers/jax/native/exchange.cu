// Sums of small arrays over the GPUs of one host, each GPU with one kernel and none with a barrier.
//
// A kernel writes its part into inboxes in the others' memory and adds up what arrives in its own. Every 8
// bytes that are sent are 4 of data and 4 that count the sums (as in the LL protocol of NCCL), so that the
// value itself says that it is there: no fence, no flag, one crossing of the link. There are two inboxes by
// turns. Whoever sends sum n + 2 has had sum n + 1 of everyone, sent by kernels that ran after those which read
// sum n; so nothing is written over before it was read. All GPUs add in the same order and get the same bits.
//
// A block waits for the same block of the others, and has an inbox and a counter of its own. Kernels must not
// overlap on a GPU, which one stream sees to, and must be launched in the same order on all of them.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <cstdio>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kPeers = 8, kOrdinals = 64;
constexpr int kBlocks = 128, kThreads = 256, kEach = 4;  // lines that a thread has at most
constexpr size_t kLines = size_t{kBlocks} * kThreads * kEach;
constexpr size_t kLineBytes = 8;  // of data, in 16 that are sent
constexpr int kSpins = 256;       // between two looks at the clock

// What a GPU's kernels know of a group; all pointers are to device memory.
struct View {
  uint4* inboxes[kPeers];  // each GPU's, [2][peers][kLines]
  uint32_t* counters;      // this GPU's, [kBlocks]
  int rank, peers;
  uint64_t patience;  // in ns; whoever waits longer makes NaN, or, where fatal, ends the process's work on GPUs
  bool fatal;
};

struct Seat {
  View view;
  std::atomic<bool> taken{false};
};

Seat seats[kOrdinals][kPeers + 1];  // by GPU and size of the group

template <typename T>
struct Word;  // 4 bytes of an array as floats

template <>
struct Word<__nv_bfloat16> {
  static constexpr int kFloats = 2;
  static __device__ void add(float* sums, uint32_t word) {
    sums[0] += __uint_as_float(word << 16);
    sums[1] += __uint_as_float(word & 0xffff0000u);
  }
  static __device__ uint32_t pack(const float* sums) {
    __nv_bfloat162 both = __floats2bfloat162_rn(sums[0], sums[1]);
    return *reinterpret_cast<uint32_t*>(&both);
  }
};

template <>
struct Word<float> {
  static constexpr int kFloats = 1;
  static __device__ void add(float* sums, uint32_t word) { sums[0] += __uint_as_float(word); }
  static __device__ uint32_t pack(const float* sums) { return __float_as_uint(sums[0]); }
};

__device__ void send(uint4* to, uint2 data, uint32_t count) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(data.x), "r"(count),
               "r"(data.y), "r"(count)
               : "memory");
}

__device__ uint4 look(const uint4* at) {
  uint4 line;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(line.x), "=r"(line.y), "=r"(line.z), "=r"(line.w)
               : "l"(at)
               : "memory");
  return line;
}

__device__ uint64_t now() {
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

// Zero is what an inbox holds at first; the inboxes take turns also where the count starts again.
__device__ uint32_t after(uint32_t count) { return count + 1 ? count + 1 : 2; }

// The sum of a part of `lines` of all GPUs; a thread has up to Lines of them. Room for Peers GPUs.
template <typename T, int Peers, int Lines>
__global__ void __launch_bounds__(kThreads) sum(const __grid_constant__ View view, const uint2* part,
                                                uint2* whole, int lines) {
  const int peers = view.peers, rank = view.rank, block = blockIdx.x, thread = threadIdx.x;
  const uint32_t count = after(view.counters[block]);
  const size_t at = size_t(block) * kThreads * kEach + thread;
  uint2 own[Lines];
  int index[Lines];
#pragma unroll
  for (int l = 0; l < Lines; ++l) {
    index[l] = (l * gridDim.x + block) * kThreads + thread;
    if (index[l] < lines) own[l] = part[index[l]];
  }
#pragma unroll
  for (int step = 1; step < Peers; ++step) {
    if (step >= peers) break;
    const int to = rank + step < peers ? rank + step : rank + step - peers;
    uint4* inbox = view.inboxes[to] + (size_t(count & 1) * peers + rank) * kLines + at;
#pragma unroll
    for (int l = 0; l < Lines; ++l)
      if (index[l] < lines) send(inbox + l * kThreads, own[l], count);
  }

  uint2 got[Peers][Lines];
  const uint4* inbox = view.inboxes[rank] + size_t(count & 1) * peers * kLines + at;
  bool there, late = false;
  uint64_t begun = 0;
  int spins = 0;
  do {
    there = true;
#pragma unroll
    for (int from = 0; from < Peers; ++from) {
#pragma unroll
      for (int l = 0; l < Lines; ++l) {
        if (from >= peers || from == rank || index[l] >= lines) continue;
        const uint4 line = look(inbox + from * kLines + l * kThreads);
        got[from][l] = make_uint2(line.x, line.z);
        there &= line.y == count && line.w == count;
      }
    }
    if (!there && ++spins % kSpins == 0) {
      if (!begun) begun = now();
      late = now() - begun > view.patience;
    }
  } while (!there && !late);
  if (late && view.fatal) __trap();

#pragma unroll
  for (int l = 0; l < Lines; ++l) {
    if (index[l] >= lines) continue;
    constexpr int kFloats = Word<T>::kFloats;
    float sums[2 * kFloats] = {};
#pragma unroll
    for (int from = 0; from < Peers; ++from) {
      if (from >= peers) break;
      const uint2 data = from == rank ? own[l] : got[from][l];
      Word<T>::add(sums, data.x);
      Word<T>::add(sums + kFloats, data.y);
    }
    if (late)
      for (float& each : sums) each = __int_as_float(0x7fc00000);
    whole[index[l]] = make_uint2(Word<T>::pack(sums), Word<T>::pack(sums + kFloats));
  }
  __syncthreads();  // all have read the counter
  if (thread == 0) view.counters[block] = count;
}

using Kernel = void (*)(View, const uint2*, uint2*, int);

template <typename T, int Peers>
Kernel by_lines(int lines) {
  return lines == 1 ? sum<T, Peers, 1> : lines == 2 ? sum<T, Peers, 2> : sum<T, Peers, 4>;
}

template <typename T>
Kernel pick(int peers, int lines) {
  return peers == 2 ? by_lines<T, 2>(lines) : peers <= 4 ? by_lines<T, 4>(lines) : by_lines<T, 8>(lines);
}

cudaError_t failed(const char* what, cudaError_t error, char* why, size_t room) {
  if (error != cudaSuccess) snprintf(why, room, "%s: %s", what, cudaGetErrorString(error));
  return error;
}

// Peers reach each other's memory, and kernels are loaded: loading one later could wait for one that spins.
cudaError_t prepare(const int* ordinals, int peers, int rank, char* why, size_t room) {
  for (int other = 0; other < peers; ++other) {
    if (other == rank) continue;
    int able = 0;
    cudaError_t error = cudaDeviceCanAccessPeer(&able, ordinals[rank], ordinals[other]);
    if (!error && !able) error = cudaErrorPeerAccessUnsupported;
    if (!error) error = cudaDeviceEnablePeerAccess(ordinals[other], 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) error = cudaSuccess, cudaGetLastError();
    if (failed("memory of a peer", error, why, room)) return error;
  }
  for (int lines : {1, 2, 4})
    for (Kernel kernel : {pick<float>(peers, lines), pick<__nv_bfloat16>(peers, lines)}) {
      cudaFuncAttributes facts;
      cudaError_t error = cudaFuncGetAttributes(&facts, reinterpret_cast<const void*>(kernel));
      if (failed("loading a kernel", error, why, room)) return error;
    }
  return cudaSuccess;
}

cudaError_t allocate(int peers, uint4** inbox, uint32_t** counters) {
  const size_t bytes = 2 * peers * kLines * sizeof(uint4);
  cudaError_t error = cudaMalloc(reinterpret_cast<void**>(inbox), bytes);
  if (!error) error = cudaMemset(*inbox, 0, bytes);
  if (!error) error = cudaMalloc(reinterpret_cast<void**>(counters), kBlocks * sizeof(uint32_t));
  if (!error) error = cudaMemset(*counters, 0, kBlocks * sizeof(uint32_t));
  if (!error) error = cudaDeviceSynchronize();
  return error;
}

cudaError_t open(const int* ordinals, int peers, uint4** inboxes, uint32_t** counters, char* why,
                 size_t room) {
  for (int rank = 0; rank < peers; ++rank) {
    cudaError_t error = cudaSetDevice(ordinals[rank]);
    if (failed("choosing a GPU", error, why, room)) return error;
    if ((error = prepare(ordinals, peers, rank, why, room))) return error;
    error = allocate(peers, &inboxes[rank], &counters[rank]);
    if (failed("memory for sums", error, why, room)) return error;
  }
  return cudaSuccess;
}

ffi::Error add_up(cudaStream_t stream, int32_t ordinal, ffi::AnyBuffer part, ffi::Result<ffi::AnyBuffer> whole,
                  int32_t peers) {
  if (ordinal < 0 || ordinal >= kOrdinals || peers < 2 || peers > kPeers ||
      !seats[ordinal][peers].taken.load(std::memory_order_acquire))
    return ffi::Error::Internal("this GPU is in no group that sums");
  const size_t bytes = part.size_bytes(), lines = bytes / kLineBytes;
  const auto from = reinterpret_cast<uintptr_t>(part.untyped_data());
  const auto to = reinterpret_cast<uintptr_t>(whole->untyped_data());
  if (bytes % kLineBytes || lines > kLines || (from | to) % kLineBytes)
    return ffi::Error::InvalidArgument("an array of this size or place cannot be summed");
  if (!lines) return ffi::Error::Success();
  int each = 1;
  while (size_t(each) * kBlocks * kThreads < lines) each *= 2;
  const int blocks = int((lines + size_t(each) * kThreads - 1) / (size_t(each) * kThreads));
  const bool narrow = part.element_type() == ffi::DataType::BF16;
  if (!narrow && part.element_type() != ffi::DataType::F32)
    return ffi::Error::InvalidArgument("only float32 and bfloat16 are summed");
  const Kernel kernel = narrow ? pick<__nv_bfloat16>(peers, each) : pick<float>(peers, each);
  kernel<<<blocks, kThreads, 0, stream>>>(seats[ordinal][peers].view, reinterpret_cast<const uint2*>(from),
                                          reinterpret_cast<uint2*>(to), int(lines));
  const cudaError_t error = cudaGetLastError();
  return error ? ffi::Error::Internal(cudaGetErrorString(error)) : ffi::Error::Success();
}

}  // namespace

// Make GPUs a group, in the order that they add in; 0, or `why` not. A GPU is in one group of each size.
extern "C" int llmos_exchange_open(const int* ordinals, int peers, double seconds, char* why, size_t room) {
  if (peers < 2 || peers > kPeers) return snprintf(why, room, "%d GPUs are not 2 to %d", peers, kPeers), 1;
  for (int rank = 0; rank < peers; ++rank)
    if (ordinals[rank] < 0 || ordinals[rank] >= kOrdinals || seats[ordinals[rank]][peers].taken)
      return snprintf(why, room, "GPU %d cannot be in this group", ordinals[rank]), 1;
  int before = 0;
  uint4* inboxes[kPeers] = {};
  uint32_t* counters[kPeers] = {};
  cudaGetDevice(&before);
  cudaError_t error = open(ordinals, peers, inboxes, counters, why, room);
  for (int rank = 0; rank < peers; ++rank) {
    cudaSetDevice(ordinals[rank]);
    if (error) {
      cudaFree(inboxes[rank]), cudaFree(counters[rank]);
      continue;
    }
    Seat& seat = seats[ordinals[rank]][peers];
    for (int other = 0; other < peers; ++other) seat.view.inboxes[other] = inboxes[other];
    seat.view.counters = counters[rank];
    seat.view.rank = rank, seat.view.peers = peers;
    seat.view.patience = uint64_t(seconds * 1e9), seat.view.fatal = false;
    seat.taken.store(true, std::memory_order_release);
  }
  cudaSetDevice(before);
  cudaGetLastError();
  return error;
}

// From now on a group waits so long, and a GPU that never comes is fatal: the group has proved to work.
extern "C" void llmos_exchange_trust(const int* ordinals, int peers, double seconds) {
  for (int rank = 0; rank < peers; ++rank) {
    View& view = seats[ordinals[rank]][peers].view;
    view.patience = uint64_t(seconds * 1e9), view.fatal = true;
  }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(llmos_sum, add_up,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("peers"),
                              {ffi::Traits::kCmdBufferCompatible});
