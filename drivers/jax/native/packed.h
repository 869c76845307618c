// A product with many rows: weights are widened and packed into panels that stay in the second-level cache, and
// all rows are run past a panel (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication",
// 2008). A narrow weight is thus converted once a call, a few rows of it at a time, and never lies wide in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "common.h"
#include "pairs.h"

namespace {

// A register tile is kStrip rows of input by two vectors of outputs.
#if defined(__AVX512F__)
constexpr int kStrip = 12;
#else
constexpr int kStrip = 6;
#endif
constexpr int kPanel = 2 * kLanes;

#if defined(__AVX2__)
// Eight rows of eight floats, turned.
inline void turn(const __m256 (&in)[8], __m256 (&out)[8]) {
  __m256 pairs[8], fours[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 8
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

inline __m256 eight(const float* x) { return _mm256_loadu_ps(x); }
inline __m256 eight(const bfloat16* x) {
  __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 eight(const int8_t* x) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}
#endif

// panel[k * kPanel + o] = row(o)[k] for o < count, and zero up to kPanel. What lies ``ahead`` bytes behind is fetched.
template <typename Row>
void pack(const Row& row, int64_t count, int64_t inner, float* panel, int64_t ahead = 0) {
  int64_t o = 0;
#if defined(__AVX2__)
  for (; o + 8 <= count; o += 8) {
    int64_t k = 0;
    for (; k + 8 <= inner; k += 8) {
      __m256 rows[8], turned[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        rows[i] = eight(row(o + i) + k);
        if (ahead) fetch(row(o + i) + k, ahead);
      }
      turn(rows, turned);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(panel + (k + i) * kPanel + o, turned[i]);
    }
    for (; k < inner; ++k) {
      for (int i = 0; i < 8; ++i) panel[k * kPanel + o + i] = widen(row(o + i)[k]);
    }
  }
#endif
  for (; o < kPanel; ++o) {
    for (int64_t k = 0; k < inner; ++k) panel[k * kPanel + o] = o < count ? widen(row(o)[k]) : 0;
  }
}

// sum + a number of a row times a vector of weights.
inline Floats added(Floats sum, float x, Floats w) { return sum + x * w; }

// tile[r * kPanel + o] = sum over k of x[r, k] * panel[k, o]. Apart from what follows, lest sums leave registers.
template <int R, typename X>
__attribute__((noinline)) void strip(const X* x, const float* panel, int64_t inner, float* tile) {
  Floats sums[R][2];  // cleared and stored one by one, lest both go through memory by calls
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = Floats{};
  for (int64_t k = 0; k < inner; ++k) {
    Floats low = load(panel + k * kPanel), high = load(panel + k * kPanel + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      X each = x[r * inner + k];
      sums[r][0] = added(sums[r][0], each, low);
      sums[r][1] = added(sums[r][1], each, high);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(sums[r][0], tile + r * kPanel);
    store(sums[r][1], tile + r * kPanel + kLanes);
  }
}

template <typename X>
using Strip = void (*)(const X*, const float*, int64_t, float*);

// The strip of so many rows, from one to kStrip.
template <typename X, int... I>
Strip<X> strip_of(int64_t rows, std::integer_sequence<int, I...>) {
  constexpr Strip<X> strips[] = {strip<I + 1, X>...};
  return strips[rows - 1];
}

// The first ``count`` numbers of a row of a tile to y.
inline void put_row(const float* row, Output y, int64_t at, int64_t count) {
  int64_t o = 0;
  for (; o + kLanes <= count; o += kLanes) {
    Floats x = load(row + o);
    if (y.wide) {
      store(x, static_cast<float*>(y.data) + at + o);
    } else {
      store(x, static_cast<bfloat16*>(y.data) + at + o);
    }
  }
  for (; o < count; ++o) y.put(at + o, row[o]);
}

// Rows x [count, inner] times w [outer, inner]; y is [count, outer].
template <typename X>
struct ManyRows {
  const X* x;
  Output y;
  int64_t count, inner, outer;

  // Outputs first .. last - 1 of rows from .. to - 1.
  template <typename W>
  void block(const W* w, int64_t first, int64_t last, int64_t from, int64_t to) const {
    thread_local std::vector<float> panels;
    int64_t many = (last - first + kPanel - 1) / kPanel, size = kPanel * inner;
    panels.resize(many * size);
    for (int64_t p = 0; p < many; ++p) {
      int64_t o = first + p * kPanel;
      auto row = [=](int64_t i) { return w + (o + i) * inner; };
      pack(row, std::min<int64_t>(kPanel, last - o), inner, panels.data() + p * size, kAhead);
    }
    for (int64_t r = from; r < to; r += kStrip) {
      int64_t rows = std::min<int64_t>(kStrip, to - r);
      Strip<X> multiply = strip_of<X>(rows, std::make_integer_sequence<int, kStrip>());
      for (int64_t p = 0; p < many; ++p) {
        int64_t o = first + p * kPanel;
        float tile[kStrip * kPanel];
        multiply(x + r * inner, panels.data() + p * size, inner, tile);
        for (int64_t row = 0; row < rows; ++row) {
          put_row(tile + row * kPanel, y, (r + row) * outer + o, std::min<int64_t>(kPanel, last - o));
        }
      }
    }
  }

  template <typename W>
  void spread_over(const Pool& pool, const void* weights) const {
    constexpr int64_t kPackedBytes = 3 << 16, kMostRows = 512, kFewestRows = 48;
    const W* w = static_cast<const W*>(weights);
    int64_t fitting = std::max<int64_t>(1, kPackedBytes / (inner * int64_t(sizeof(float)) * kPanel));
    int64_t panels = (outer + kPanel - 1) / kPanel, threads = pool.size(), columns = (panels + fitting - 1) / fitting;
    columns = std::min(panels, (columns + threads - 1) / threads * threads);  // as many for each thread
    // More parts pack the same weights more often, but give many threads something to do.
    int64_t parts = std::min((2 * threads + columns - 1) / columns, count / kFewestRows);
    parts = std::max(parts, (count + kMostRows - 1) / kMostRows);
    spread(pool, columns * parts, false, [=, this_ = *this](int64_t i) {
      int64_t column = i % columns, part = i / columns;
      int64_t first = column * panels / columns * kPanel, last = (column + 1) * panels / columns * kPanel;
      this_.block(w, first, std::min(outer, last), part * this_.count / parts, (part + 1) * this_.count / parts);
    });
  }
};

}  // namespace
