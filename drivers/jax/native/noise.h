// Gumbel's noise, that of noise.py to the bit before its logarithms. These are libm's, which differ from XLA's by a few
// units in the last place, so that tokens differ only where two come as near to each other as that.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common.h"

namespace {

typedef uint32_t Words __attribute__((vector_size(kLanes * 4), aligned(4)));

// Threefry-2x32 with 20 rounds (Salmon et al., 2011), of words or of vectors of them.
template <typename W>
inline void threefry(uint32_t first, uint32_t second, W& x, W& y) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {first, second, first ^ second ^ 0x1bd11bda};
  x += keys[0], y += keys[1];
#pragma GCC unroll 5
  for (int turn = 0; turn < 5; ++turn) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      int bits = kRotations[turn % 2][i];
      x += y, y = (y << bits | y >> (32 - bits)) ^ x;
    }
    x += keys[(turn + 1) % 3], y += keys[(turn + 2) % 3] + uint32_t(turn + 1);
  }
}

// The noise of a row: its 23 random bits by place, and Gumbel's numbers of them.
struct Noise {
  static constexpr float kMost = 15.943f;  // no noise is more
  uint32_t first = 0, second;

  Noise(uint32_t seed, int32_t position) : second(uint32_t(position)) { threefry(0, seed, first, second); }

  template <typename W>
  W bits(W place) const {
    W none{};
    threefry(first, second, none, place);
    return (none ^ place) >> 9;
  }

  static float of(uint32_t bits) {
    float uniform = std::max(float(bits) * 0x1p-23f, std::numeric_limits<float>::min());
    return -std::log(-std::log(uniform));
  }

  // At least ``of``: -log(u) >= 1 - u, and a float's bits are as many parts of an octave as is less than its log2.
  static Floats bound(Words bits) {
    Floats rest = __builtin_convertvector(Ints(0x800000 - bits), Floats);
    Floats octaves = __builtin_convertvector(Ints(rest) - ((127 + 23) << 23), Floats) * 0x1p-23f;
    return octaves * -0.693148f + 1e-4f;
  }
};

}  // namespace
