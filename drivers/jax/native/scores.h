// What attention of one token makes of tokens that lie together in a page: scores, their softmax, and mixed values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common.h"
#include "direct.h"
#include "pairs.h"

namespace {

// Products [heads, stride] to weights that sum to one over the first ``count`` tokens.
void softmax(float* scores, int64_t heads, int64_t count, int64_t stride, const Paged& at) {
  for (int64_t g = 0; g < heads; ++g) {
    float* row = scores + g * stride;
    float scale = at.cap != 0 ? 1 : at.scale;
    if (at.cap != 0) {
      for (int64_t t = 0; t < count; ++t) row[t] = std::tanh(row[t] * at.scale / at.cap) * at.cap;
    }
    std::fill(row + count, row + stride, -std::numeric_limits<float>::infinity());
    Floats tops = load(row), sums = {};
    for (int64_t t = kLanes; t < stride; t += kLanes) {
      Floats some = load(row + t);
      tops = some > tops ? some : tops;
    }
    float top = largest(tops);
    for (int64_t t = 0; t < stride; t += kLanes) {
      Floats weights = exponential((load(row + t) - top) * scale);
      for (int i = 0; t + kLanes > count && i < kLanes; ++i) weights[i] = t + i < count ? weights[i] : 0;
      std::memcpy(row + t, &weights, sizeof(weights));
      sums += weights;
    }
    float share = 1 / total(sums);
    for (int64_t t = 0; t < stride; t += kLanes) {
      Floats weights = load(row + t) * share;
      std::memcpy(row + t, &weights, sizeof(weights));
    }
  }
}

// out[g, d] += sum over t of weights[g, t] * v[t, d], for G heads and D vectors of components.
template <int G, int D, typename T>
inline void mix(const float* weights, int64_t stride, const T* v, int64_t count, int64_t head_dim, float* out) {
  Floats sums[G][D];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) sums[g][d] = load(out + g * head_dim + d * kLanes);
  }
  for (int64_t t = 0; t < count; ++t) {
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) {
      Floats value = load(v + t * head_dim + d * kLanes);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sums[g][d] += weights[g * stride + t] * value;
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) std::memcpy(out + g * head_dim + d * kLanes, &sums[g][d], sizeof(Floats));
  }
}

template <int D, typename T>
inline void mix_heads(const float* weights, int64_t stride, const T* v, int64_t count, const Paged& at, float* out) {
  int64_t g = 0;
  for (; g + 3 <= at.group; g += 3) {
    mix<3, D>(weights + g * stride, stride, v, count, at.head_dim, out + g * at.head_dim);
  }
  for (; g < at.group; ++g) mix<1, D>(weights + g * stride, stride, v, count, at.head_dim, out + g * at.head_dim);
}

// Scores of query heads q [group, head_dim] with ``count`` keys -> [group, stride].
template <typename X, typename T>
inline void score(const X* q, const T* keys, int64_t count, int64_t stride, const Paged& at, float* scores) {
  Product<X>{q, {scores, true}, at.group, at.head_dim, stride, 0}.block(keys, 0, count);
}
#if defined(LLMOS_PAIRS)
inline void score(const bfloat16* q, const bfloat16* keys, int64_t count, int64_t stride, const Paged& at,
                  float* scores) {
  auto pairs = [](const bfloat16* x) { return reinterpret_cast<const Pair*>(x); };
  Product<Pair>{pairs(q), {scores, true}, at.group, at.head_dim / 2, stride, 0}.block(pairs(keys), 0, count);
}
constexpr bool kPaired = true;
#else
constexpr bool kPaired = false;
#endif

}  // namespace
