// Pairs of bfloat16 numbers, which AVX-512 BF16 multiplies as they lie, summing in float32: half the bytes and half
// the instructions of widened ones. Rows of an even length are rows of pairs; a vector of them is moved as floats.
#pragma once

#include "common.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LLMOS_PAIRS 1

namespace {

struct Pair {
  bfloat16 first, second;
};

inline float widen(Pair x) {
  float bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Eight pairs, moved as floats.
inline __m256 eight(const Pair* x) { return _mm256_loadu_ps(reinterpret_cast<const float*>(x)); }

// sum + the products of two vectors of pairs.
inline Floats added(Floats sum, Floats x, Floats w) {
  return Floats(_mm512_dpbf16_ps(__m512(sum), __m512bh(x), __m512bh(w)));
}

inline Floats added(Floats sum, Pair x, Floats w) {
  int32_t bits;  // an addition would take a pair for a number, and flush or quiet it
  std::memcpy(&bits, &x, 4);
  return added(sum, Floats(_mm512_set1_epi32(bits)), w);
}

// Two neighbours of each other, as numbers and as zeros behind them, to a vector of pairs.
inline Floats paired(Floats first, Floats second) {
  return Floats(_mm512_or_si512(_mm512_srli_epi32(__m512i(first), 16), __m512i(second)));
}

// The totals of four vectors, in one.
inline __m128 totals(Floats first, Floats second, Floats third, Floats fourth) {
  __m512 a(first), b(second), c(third), d(fourth);
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d low = _mm512_unpacklo_pd(__m512d(ab), __m512d(cd)), high = _mm512_unpackhi_pd(__m512d(ab), __m512d(cd));
  __m512 all = _mm512_add_ps(__m512(low), __m512(high));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), __m256(_mm512_extractf64x4_pd(__m512d(all), 1)));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Four results that lie side by side, of which the first ``count`` are there.
inline void put_four(Output y, int64_t at, __m128 four, int count) {
  __mmask8 there = __mmask8((1 << count) - 1);
  if (y.wide) {
    _mm_mask_storeu_ps(static_cast<float*>(y.data) + at, there, four);
  } else {
    _mm_mask_storeu_epi16(static_cast<bfloat16*>(y.data) + at, there, __m128i(_mm_cvtneps_pbh(four)));
  }
}

// As the tile of other types in direct.h, for 1 row of w or a multiple of 4; lengths in pairs.
template <int O, int R>
inline void tile(const Pair* x, const Pair* w, Output y, int64_t at, int64_t inner, int64_t outer, int64_t ahead) {
  Floats sums[O][R] = {};
  for (int64_t k = 0; k < inner; k += kLanes) {
    // What lies behind the rows' ends is taken for zeros.
    __mmask16 held = inner - k < kLanes ? __mmask16((1 << (inner - k)) - 1) : __mmask16(-1);
    Floats weights[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      weights[o] = Floats(_mm512_maskz_loadu_ps(held, w + o * inner + k));
      fetch(w + o * inner + k, ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Floats row = Floats(_mm512_maskz_loadu_ps(held, x + r * inner + k));
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) sums[o][r] = added(sums[o][r], row, weights[o]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if constexpr (O == 1) {
      put_four(y, at + r * outer, totals(sums[0][r], Floats{}, Floats{}, Floats{}), 1);
    } else {
#pragma GCC unroll 8
      for (int o = 0; o < O; o += 4) {
        put_four(y, at + r * outer + o, totals(sums[o][r], sums[o + 1][r], sums[o + 2][r], sums[o + 3][r]), 4);
      }
    }
  }
}

}  // namespace
#endif
