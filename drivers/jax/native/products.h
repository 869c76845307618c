// A product with any number of rows, and rows of bfloat16 that are widened for it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common.h"
#include "direct.h"
#include "packed.h"

namespace {

void widen_all(const Pool& pool, const bfloat16* x, int64_t size, float* wide) {
  constexpr int64_t kPiece = 1 << 15;
  int64_t pieces = (size + kPiece - 1) / kPiece;
  spread(pool, pieces, pieces < 4, [=](int64_t i) {
    int64_t at = i * kPiece, end = std::min(size, at + kPiece);
    for (; at + kLanes <= end; at += kLanes) {
      Floats some = load(x + at);
      std::memcpy(wide + at, &some, sizeof(some));
    }
    for (; at < end; ++at) wide[at] = widen(x[at]);
  });
}

// Rows x times weights w of the same length: packed if there are more than few rows.
template <typename X, typename W>
void multiply(const Pool& pool, const void* x, const void* w, Output y, int64_t count, int64_t inner, int64_t outer) {
  constexpr int64_t kFew = std::is_same_v<X, float> ? 31 : 64;  // packing pays from more rows on
  const X* rows = static_cast<const X*>(x);
  if (count > kFew) {
    ManyRows<X>{rows, y, count, inner, outer}.template spread_over<W>(pool, w);
  } else {
    Product<X>{rows, y, count, inner, outer, kAhead}.template spread_over<W>(pool, w);
  }
}

}  // namespace
