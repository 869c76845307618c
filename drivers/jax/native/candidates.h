// What may become the next token of a row: cut by top-k and top-p, and compared with its noise.
//
// A pass over a row weighs what is above a few places, as the GPU's kernel does (truncation.py), and the search for a
// cut goes on among what is between two of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "common.h"
#include "noise.h"

namespace {

constexpr float kLeast = -std::numeric_limits<float>::max(), kNan = std::numeric_limits<float>::quiet_NaN();

// A bit for each lane that is true.
inline uint32_t lanes(Ints truth) {
#if defined(__AVX512F__)
  uint32_t bits = _mm512_cmplt_epi32_mask(__m512i(truth), _mm512_setzero_si512());
  asm("" : "+r"(bits));  // GCC 12 may spill 16 bits of a mask and read 32, thinking that the others are zero
  return bits & 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(__m256(truth));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(truth[i] & 1) << i;
  return bits;
#endif
}

// The largest of numbers, and whether all of them are numbers.
struct Largest {
  Floats most = Floats{} + -std::numeric_limits<float>::infinity();
  Ints strange{};

  void see(Floats x) {
    most = x > most ? x : most;
    strange |= x != x;
  }
  float top() const { return largest(most); }
  bool sound() const { return !lanes(strange) && std::abs(top()) <= -kLeast; }
};

// Of the numbers at x the place of the first that is ``wanted``; 0 if there is none.
inline int32_t find(const float* x, int64_t count, float wanted) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    uint32_t found = lanes(load(x + i) == wanted);
    if (found) return int32_t(i + __builtin_ctz(found));
  }
  for (; i < count; ++i) {
    if (x[i] == wanted) return int32_t(i);
  }
  return 0;
}

// Places of a row, and the mass of what is not less than each.
struct Trials {
  static constexpr int kMany = 4;
  float at[kMany];
  double mass[kMany];

  // The least finite number, and half a step below the top, a quarter and an eighth.
  static Trials below(float top, float step) {
    Trials made{{kLeast}, {}};
    for (int i = 1; i < kMany; ++i) made.at[i] = std::max(kLeast, top - std::ldexp(step, -i));
    return made;
  }

  static Trials between(float low, float high) {
    Trials made{};
    for (int i = 0; i < kMany; ++i) {
      float part = float(i + 1) / (kMany + 1);
      made.at[i] = low * (1 - part) + high * part;
    }
    return made;
  }

  // Each of the ``count`` numbers at x weighs its probability in terms of the top's, or one.
  template <bool kLikely>
  void weigh(const float* x, int64_t count, float top) {
    constexpr int64_t kBlock = 64 * kLanes;  // sums of floats stay short
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      Floats sums[kMany] = {};
      for (int64_t i = begin; i < std::min(count, begin + kBlock); i += kLanes) {
        Floats some = load(x + i), weight = Floats{} + 1.0f;
        if (kLikely) weight = exponential(some - top);
#pragma GCC unroll 8
        for (int t = 0; t < kMany; ++t) sums[t] += some >= at[t] ? weight : Floats{};
      }
      for (int t = 0; t < kMany; ++t) mass[t] += total(sums[t]);
    }
  }
};

// Where a cut is: from ``low`` on the mass suffices, from ``high`` on, where it is ``above``, it does not.
struct Bracket {
  float low, high;
  double above = 0;

  // Whether the trials, of what is inside, were of any use.
  bool narrow(const Trials& trials, double wanted) {
    bool moved = false;
    double base = above;
    for (int t = 0; t < Trials::kMany; ++t) {
      bool enough = base + trials.mass[t] >= wanted;
      if (!enough && trials.at[t] < high) {
        high = trials.at[t], above = base + trials.mass[t];
        return true;
      }
      if (enough && trials.at[t] > low) low = trials.at[t], moved = true;
    }
    return moved;
  }
};

// What may become the token: heated logits and their places in the row; not a number is behind the last.
class Candidates {
 public:
  float top = 0;      // the largest of the row
  int32_t first = 0;  // where it is

  // Takes a row; whether it is sound.
  bool heat(const float* logits, int64_t vocab, float temperature) {
    reserve(vocab);
    Largest all;
    Ints place;
    for (int i = 0; i < kLanes; ++i) place[i] = i;
    auto put = [&](int64_t i, Floats some) {
      all.see(some);
      store(some / temperature, values_.data() + i);
      std::memcpy(places_.data() + i, &place, sizeof(place));
      place += kLanes;
    };
    int64_t i = 0;
    for (; i + kLanes <= vocab; i += kLanes) put(i, load(logits + i));
    if (i < vocab) {
      Floats rest = Floats{} + logits[i];
      std::memcpy(&rest, logits + i, (vocab - i) * sizeof(float));
      put(i, rest);
    }
    end(vocab);
    top = all.top() / temperature, first = find(values_.data(), count_, top);
    return all.sound();
  }

  // Keeps those for which ``wanted`` is true.
  template <typename Wanted>
  void filter(const Wanted& wanted) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count_; i += kLanes) {
      Floats some = load(values_.data() + i);
      uint32_t open = lanes(wanted(some));
      if (open) kept = move(open, i, kept);
    }
    end(kept);
  }

  // Keeps the largest that together weigh what is asked for, a number or a share of the probability, and their equals.
  template <bool kLikely>
  void cut(double asked) {
    Trials trials = Trials::below(top, kFar);
    trials.weigh<kLikely>(values_.data(), count_, top);
    double wanted = kLikely ? std::max(asked * trials.mass[0], 1.0) : asked;
    if (trials.mass[0] < wanted) return;  // what is -inf is beyond all of it
    Bracket in{kLeast, std::nextafter(top, std::numeric_limits<float>::infinity())};
    in.narrow(trials, wanted);
    filter([&](Floats x) { return x >= in.low; });
    some_.assign(values_.begin(), values_.begin() + count_ + kLanes);
    float least = search<kLikely>(inside(count_, in), wanted, in);
    filter([&](Floats x) { return x >= least; });
  }

  // The place of the largest of those that are not less than ``floor``, with noise; the first of equals.
  int32_t winner(const Noise& noise, float floor) {
    float best = top + Noise::of(noise.bits(uint32_t(first)));
    int32_t place = first;
    auto open = [&](Floats x, Floats more) { return (x >= floor) & (x + more >= best); };
    filter([&](Floats x) { return open(x, Floats{} + Noise::kMost); });
    for (int64_t i = 0; i < count_; i += kLanes) {
      Floats some = load(values_.data() + i);
      Words where;
      std::memcpy(&where, places_.data() + i, sizeof(where));
      Words bits = noise.bits(where);
      for (uint32_t left = lanes(open(some, Noise::bound(bits))); left; left &= left - 1) {
        int lane = __builtin_ctz(left);
        float noisy = some[lane] + Noise::of(bits[lane]);
        int32_t at = int32_t(where[lane]);
        if (noisy > best || (noisy == best && at < place)) best = noisy, place = at;
      }
    }
    return place;
  }

 private:
  static constexpr float kFar = 32.0f;  // the first step, and by how much the next is larger
  static constexpr int64_t kFew = 64;   // are sorted

  std::vector<float> values_, some_;
  std::vector<int32_t> places_;
  int64_t count_ = 0;

  void reserve(int64_t vocab) {
    size_t size = vocab + 2 * kLanes;
    if (values_.size() < size) values_.resize(size), places_.resize(size);
  }

  void end(int64_t count) {
    count_ = count;
    store(Floats{} + kNan, values_.data() + count);
  }

  // Moves the ``open`` ones of a vector to ``kept``, which is not behind them; how many there are then.
  int64_t move(uint32_t open, int64_t from, int64_t kept) {
#if defined(__AVX512F__)
    __m512 some = _mm512_maskz_compress_ps(open, _mm512_loadu_ps(values_.data() + from));
    __m512i place = _mm512_maskz_compress_epi32(open, _mm512_loadu_si512(places_.data() + from));
    _mm512_storeu_ps(values_.data() + kept, some);
    _mm512_storeu_si512(places_.data() + kept, place);
    return kept + __builtin_popcount(open);
#else
    for (; open; open &= open - 1, ++kept) {
      int64_t at = from + __builtin_ctz(open);
      values_[kept] = values_[at], places_[kept] = places_[at];
    }
    return kept;
#endif
  }

  // Of the first ``count`` of some_ those in the bracket remain; how many.
  int64_t inside(int64_t count, const Bracket& in) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i += kLanes) {
      Floats some = load(some_.data() + i);
      uint32_t open = lanes((some >= in.low) & (some < in.high));
#if defined(__AVX512F__)
      _mm512_storeu_ps(some_.data() + kept, _mm512_maskz_compress_ps(open, __m512(some)));
      kept += __builtin_popcount(open);
#else
      for (; open; open &= open - 1) some_[kept++] = some_[i + __builtin_ctz(open)];
#endif
    }
    store(Floats{} + kNan, some_.data() + kept);
    return kept;
  }

  // The largest number from which on the mass suffices, of the ``count`` in some_.
  template <bool kLikely>
  float search(int64_t count, double wanted, Bracket in) {
    for (float step = kFar; count > kFew;) {
      if (std::nextafter(in.low, in.high) >= in.high) return in.low;
      bool far = in.low == kLeast && std::isfinite(step *= kFar);
      Trials trials = far ? Trials::below(in.high, step) : Trials::between(in.low, in.high);
      trials.weigh<kLikely>(some_.data(), count, top);
      if (!in.narrow(trials, wanted) && !far) break;
      count = inside(count, in);
    }
    std::sort(some_.begin(), some_.begin() + count, std::greater<float>());
    double mass = in.above;
    for (int64_t i = 0; i < count; ++i) {
      mass += kLikely ? std::exp(some_[i] - top) : 1.0f;
      if (mass >= wanted) return some_[i];
    }
    return in.low;
  }
};

}  // namespace
