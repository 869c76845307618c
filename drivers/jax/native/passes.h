// What lies between the products of a layer, each in one pass over its rows: gated activations, norms and sums.
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
  Floats most = Floats{} + 88.0f, turned = -x;
  return x / (1.0f + exponential(turned > most ? most : turned));
}

inline Floats gelu_tanh(Floats x) { return 0.5f * x * (1.0f + hyperbolic(0.797884561f * (x + 0.044715f * x * x * x))); }

// visit(at) for whole vectors of a row of ``size`` numbers, and rest(at, count) for what is left.
template <typename Visit, typename Rest>
inline void by_vectors(int64_t size, const Visit& visit, const Rest& rest) {
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) visit(at);
  if (at < size) rest(at, size - at);
}

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
      by_vectors(
          size, [=](int64_t at) { store(act(load(gate + at)) * load(up + at), out + at); },
          [=](int64_t at, int64_t count) {
            store_some(act(load_some(gate + at, count)) * load_some(up + at, count), out + at, count);
          });
    }
  });
}

// sum = x + y, normed = sum / root of its mean square * (unit + scale), each [rows, size] and rounded to X, as is
// what ``scale`` meets where ``unit`` is 0.
template <typename X>
void norm_rows(const Pool& pool, const X* x, const X* y, const X* scale, X* sum, X* normed, int64_t rows, int64_t size,
               float eps, float unit) {
  constexpr int64_t kPiece = 1 << 14;
  int64_t step = std::max<int64_t>(1, kPiece / size), pieces = (rows + step - 1) / step;
  spread(pool, pieces, pieces < 2, [=](int64_t i) {
    for (int64_t r = i * step; r < std::min(rows, (i + 1) * step); ++r) {
      const X *first = x + r * size, *second = y + r * size;
      X *both = sum + r * size, *out = normed + r * size;
      Floats squares{};
      by_vectors(
          size,
          [&](int64_t at) {
            store(load(first + at) + load(second + at), both + at);
            squares += load(both + at) * load(both + at);
          },
          [&](int64_t at, int64_t count) {
            store_some(load_some(first + at, count) + load_some(second + at, count), both + at, count);
            squares += load_some(both + at, count) * load_some(both + at, count);
          });
      float share = 1 / std::sqrt(total(squares) / float(size) + eps);
      auto scaled = [=](Floats wide, Floats by) {
        X own[kLanes];
        store(wide * share, own);
        return unit != 0 ? wide * share * (unit + by) : load(own) * by;
      };
      by_vectors(
          size, [=](int64_t at) { store(scaled(load(both + at), load(scale + at)), out + at); },
          [=](int64_t at, int64_t count) {
            store_some(scaled(load_some(both + at, count), load_some(scale + at, count)), out + at, count);
          });
    }
  });
}

}  // namespace
