// A product with few rows: weights are read once and as they lie, and are widened in registers. Those of pairs are
// in pairs.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common.h"
#include "pairs.h"

namespace {

// y[at + r * outer + o] = sum over k of x[r, k] * w[o, k], for O rows of w and R rows of x. What lies ``ahead`` bytes
// behind these weights is fetched.
template <int O, int R, typename W>
inline void tile(const float* x, const W* w, Output y, int64_t at, int64_t inner, int64_t outer, int64_t ahead) {
  Floats sums[O][R] = {};
  int64_t k = 0;
  for (; k + kLanes <= inner; k += kLanes) {
    Floats weights[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      weights[o] = load(w + o * inner + k);
      fetch(w + o * inner + k, ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Floats row = load(x + r * inner + k);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) sums[o][r] += weights[o] * row;
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float sum = total(sums[o][r]);
      for (int64_t rest = k; rest < inner; ++rest) sum += x[r * inner + rest] * widen(w[o * inner + rest]);
      y.put(at + r * outer + o, sum);
    }
  }
}

// A product whose ``count`` rows x [count, inner] meet rows of weights; y is [count, outer].
template <typename X>
struct Product {
  const X* x;
  Output y;
  int64_t count, inner, outer, ahead;

  // Outputs at .. at + O * tiles - 1, all rows. Some rows of x meet all the tiles, so that both stay in cache.
  template <int O, typename W>
  void panel(const W* w, int64_t at, int64_t tiles) const {
    int64_t r = 0;
    for (; r + kRows <= count; r += kRows) strip<O, kRows>(w, r, at, tiles);
    switch (count - r) {
      case 1: return strip<O, 1>(w, r, at, tiles);
      case 2: return strip<O, 2>(w, r, at, tiles);
      case 3: return strip<O, 3>(w, r, at, tiles);
      case 4: return strip<O, 4>(w, r, at, tiles);
    }
  }

  template <int O, int R, typename W>
  void strip(const W* w, int64_t r, int64_t at, int64_t tiles) const {
    for (int64_t o = at; o < at + O * tiles; o += O) {
      tile<O, R>(x + r * inner, w + o * inner, y, o + r * outer, inner, outer, ahead);
    }
  }

  // Outputs first .. last - 1.
  template <typename W>
  void block(const W* w, int64_t first, int64_t last) const {
    constexpr int64_t kAlone = 8;  // one row of input leaves registers for more rows of weights
    constexpr int64_t kPanelBytes = 1 << 14;
    int64_t o = first;
    if (count == 1) {
      for (; o + kAlone <= last; o += kAlone) tile<kAlone, 1>(x, w + o * inner, y, o, inner, outer, ahead);
    }
    int64_t tiles = std::max<int64_t>(1, kPanelBytes / (inner * int64_t(sizeof(W)) * kWeights));
    while (o + kWeights <= last) {
      int64_t many = std::min(tiles, (last - o) / kWeights);
      panel<kWeights>(w, o, many);
      o += many * kWeights;
    }
    for (; o < last; ++o) {
      for (int64_t r = 0; r < count; ++r) strip<1, 1>(w, r, o, 1);
    }
  }

  template <typename W>
  void spread_over(const Pool& pool, const void* weights) const {
    constexpr int64_t kBlockBytes = 1 << 16, kSmallWork = 1 << 16;
    const W* w = static_cast<const W*>(weights);
    int64_t step = std::max<int64_t>(1, kBlockBytes / (inner * int64_t(sizeof(W)) * 24)) * 24;
    spread(pool, (outer + step - 1) / step, outer * inner * count < kSmallWork, [=, this_ = *this](int64_t i) {
      this_.block(w, i * step, std::min(outer, (i + 1) * step));
    });
  }
};

}  // namespace
