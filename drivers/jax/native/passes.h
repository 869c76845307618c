// Gated activations in one pass, and the functions of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common.h"

namespace {

// tanh, by exp; good to some 1e-7 of what is at most 1.
inline Floats hyperbolic(Floats x) {
  Floats most = Floats{} + 20.0f;  // tanh of more is 1 in float32; not a number stays so
  x = x > most ? most : x;
  return 1.0f - 2.0f / (exponential(x + x) + 1.0f);
}

inline Floats silu(Floats x) {
  Floats least = Floats{} - 88.0f;  // silu of less is 0 in float32
  return x < least ? Floats{} : x / (1.0f + exponential(x < least ? -least : -x));
}

inline Floats gelu_tanh(Floats x) { return 0.5f * x * (1.0f + hyperbolic(0.797884561f * (x + 0.044715f * x * x * x))); }

// The ``count`` numbers at x and zeros behind them.
template <typename X>
inline Floats load_some(const X* x, int64_t count) {
  X some[kLanes] = {};
  std::copy(x, x + count, some);
  return load(some);
}

template <typename X>
inline void store_some(Floats x, X* out, int64_t count) {
  X some[kLanes];
  store(x, some);
  std::copy(some, some + count, out);
}

// y[r, i] = act(x[r, i]) * x[r, size + i].
template <typename X, typename Act>
void gate_rows(const Pool& pool, const X* x, X* y, int64_t rows, int64_t size, const Act& act) {
  constexpr int64_t kPiece = 1 << 14;  // numbers that are worth a thread's while
  int64_t step = std::max<int64_t>(1, kPiece / size), pieces = (rows + step - 1) / step;
  spread(pool, pieces, pieces < 2, [=](int64_t i) {
    for (int64_t r = i * step; r < std::min(rows, (i + 1) * step); ++r) {
      const X *gate = x + 2 * r * size, *up = gate + size;
      X* out = y + r * size;
      int64_t at = 0, rest = size % kLanes;
      for (; at + kLanes <= size; at += kLanes) store(act(load(gate + at)) * load(up + at), out + at);
      if (rest) store_some(act(load_some(gate + at, rest)) * load_some(up + at, rest), out + at, rest);
    }
  });
}

}  // namespace
