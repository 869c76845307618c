// Attention of many new tokens over pages, with a running maximum and sum (Dao et al., "FlashAttention", 2022).
//
// A tile of queries, all heads of a group together, meets the keys it sees a block at a time. Keys and values of a
// block are packed from the pages where they lie into panels, as weights are in packed.h, and strips of query rows
// are run past them. Scores, maxima and sums are float32; weights are rounded to what the values are multiplied in.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "common.h"
#include "packed.h"
#include "pairs.h"
#include "passes.h"

namespace {

// What is multiplied: pairs where the processor multiplies them and both sides are bfloat16, else single floats.
#if defined(LLMOS_PAIRS)
template <typename X, typename T>
using Factor = std::conditional_t<std::is_same_v<X, bfloat16> && std::is_same_v<T, bfloat16>, Pair, float>;
#else
template <typename X, typename T>
using Factor = float;
#endif

// C new tokens of each of ``rows`` rows, as they come: query heads, then key heads, then value heads, before their
// rotation by cos and sin [rows, tokens, half].
template <typename X, typename T>
struct Prompts {
  Paged at;
  int64_t rows, tokens, half;
  const X* heads;
  const float *cos, *sin;
  T *keys, *values;
  const int32_t *tables, *starts, *lengths, *pages, *offsets;
  X* out;

  int64_t query_heads() const { return at.kv_heads * at.group; }
  const X* token(int64_t number) const {
    return heads + number * (query_heads() + 2 * at.kv_heads) * at.head_dim;
  }
  // How many tokens a row has, and how many of the new ones count.
  int64_t length(int64_t row) const { return std::clamp<int64_t>(lengths[row], 0, at.width * at.page_tokens); }
  int64_t counted(int64_t row) const {
    return std::clamp<int64_t>(length(row) - std::max(starts[row], 0), 0, tokens);
  }
};

// The head x [head_dim] of token ``number``, turned and rounded to its type, to out.
template <typename X, typename T, typename Y>
void turn_head(const Prompts<X, T>& all, int64_t number, const X* x, Y* out) {
  const float *cos = all.cos + number * all.half, *sin = all.sin + number * all.half;
  // Rounded to what heads are made of, and then to what is asked for.
  auto put = [out](int64_t d, float wide) {
    X own;
    narrow(wide, &own);
    narrow(widen(own), out + d);
  };
  auto put_many = [out](int64_t d, Floats wide) {
    X own[kLanes];
    store(wide, own);
    store(load(own), out + d);
  };
  int64_t d = 0, half = all.half;
  for (; d + kLanes <= half; d += kLanes) {
    Floats first = load(x + d), second = load(x + half + d), c = load(cos + d), s = load(sin + d);
    put_many(d, first * c - second * s);
    put_many(half + d, second * c + first * s);
  }
  for (; d < half; ++d) {
    float first = widen(x[d]), second = widen(x[half + d]);
    put(d, first * cos[d] - second * sin[d]);
    put(half + d, second * cos[d] + first * sin[d]);
  }
  for (d = 2 * half; d % kLanes; ++d) put(d, widen(x[d]));
  for (; d < all.at.head_dim; d += kLanes) put_many(d, load(x + d));
}

// The keys, turned, and values of token ``number`` to their page, if there is one.
template <typename X, typename T>
void write_token(const Prompts<X, T>& all, int64_t number) {
  const Paged& at = all.at;
  int64_t page = all.pages[number], offset = all.offsets[number];
  if (page < 0 || page >= at.pages || offset < 0 || offset >= at.page_tokens) return;
  const X* k = all.token(number) + all.query_heads() * at.head_dim;
  const X* v = k + at.kv_heads * at.head_dim;
  for (int64_t h = 0; h < at.kv_heads; ++h) {
    int64_t where = ((page * at.kv_heads + h) * at.page_tokens + offset) * at.head_dim;
    turn_head(all, number, k + h * at.head_dim, all.keys + where);
    for (int64_t d = 0; d < at.head_dim; ++d) narrow(widen(v[h * at.head_dim + d]), all.values + where + d);
  }
}

// What a thread needs for one tile of queries.
template <typename X, typename T>
struct Tile {
  using F = Factor<X, T>;
  static constexpr int64_t kBlock = 256;  // keys that are packed at once
  static constexpr int64_t kWide = std::is_same_v<F, float> ? 1 : 2;  // numbers in a factor
  using Y = std::conditional_t<kWide == 2, bfloat16, float>;

  int64_t size, many;  // numbers of a head, and rows of queries: heads of a group for one token after the other
  std::vector<Y> queries;
  std::vector<float> key_panels, value_panels, mixed, tops, sums;
  int64_t at[kBlock];                      // where the block's tokens lie
  float scores[kStrip * kBlock];           // [panels, rows of the strip, kPanel]
  alignas(64) Y weights[kStrip * kBlock];  // [rows of the strip, keys that any of them sees]

  int64_t value_parts() const { return (size + kPanel - 1) / kPanel; }
  int64_t wide_size() const { return value_parts() * kPanel; }

  void begin(const Prompts<X, T>& all, int64_t row, int64_t head, int64_t from, int64_t to) {
    size = all.at.head_dim, many = (to - from) * all.at.group;
    queries.resize(many * size);
    mixed.assign(many * wide_size(), 0.0f);
    tops.assign(many, -std::numeric_limits<float>::infinity());
    sums.assign(many, 0.0f);
    key_panels.resize(kBlock * size / kWide);
    value_panels.resize(value_parts() * kBlock / kWide * kPanel);
    for (int64_t i = from; i < to; ++i) {
      int64_t number = row * all.tokens + i;
      for (int64_t g = 0; g < all.at.group; ++g) {
        const X* q = all.token(number) + (head * all.at.group + g) * size;
        turn_head(all, number, q, queries.data() + ((i - from) * all.at.group + g) * size);
      }
    }
  }

  // Packs the keys and values of ``count`` tokens of a row from token ``first`` on.
  void pack_block(const Prompts<X, T>& all, int64_t row, int64_t head, int64_t first, int64_t count) {
    const Paged& paged = all.at;
    const int32_t* table = all.tables + row * paged.width;
    for (int64_t t = 0; t < count;) {
      int64_t column = (first + t) / paged.page_tokens, offset = (first + t) % paged.page_tokens;
      int64_t page = std::clamp<int64_t>(table[column], 0, paged.pages - 1);
      int64_t where = ((page * paged.kv_heads + head) * paged.page_tokens + offset) * size;
      for (; offset < paged.page_tokens && t < count; ++offset, ++t, where += size) at[t] = where;
    }
    for (int64_t t = 0; t < count; t += kPanel) {
      auto key = [&](int64_t o) {
        if constexpr (kWide == 2) {
          return reinterpret_cast<const F*>(all.keys + at[t + o]);
        } else {
          return static_cast<const T*>(all.keys + at[t + o]);
        }
      };
      pack(key, std::min<int64_t>(kPanel, count - t), size / kWide, key_panels.data() + t * size / kWide);
    }
    pack_values(all.values, count);
  }

  // value_panels[part, t / kWide, d] are the values d of token t, or of a pair of tokens; zeros behind the last one
  // up to a whole vector, and behind the last d.
  void pack_values(const T* values, int64_t count) {
    int64_t stride = kBlock / kWide * kPanel, whole = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t t = 0; t < whole; t += kWide) {
      float* into = value_panels.data() + t / kWide * kPanel;
      for (int64_t d = 0; d < wide_size(); d += kLanes) {
        auto value = [&](int64_t t) { return t < count && d < size ? load(values + at[t] + d) : Floats{}; };
        float* place = into + d / kPanel * stride + d % kPanel;
        if constexpr (kWide == 2) {
          store(paired(value(t), value(t + 1)), place);
        } else {
          store(value(t), place);
        }
      }
    }
  }

  // The weights of a strip's row over the keys low .. high - 1 of ``span``, zeros for the others; returns by what the
  // row's sums so far are to be multiplied.
  float weigh(const Paged& paged, int64_t r, int64_t row, int64_t rows, int64_t low, int64_t high, int64_t span) {
    Y* into = weights + row * span;
    if (low >= high) {
      std::fill(into, into + span, Y{});
      return 1;
    }
    const float least = -std::numeric_limits<float>::infinity(), scale = paged.scale, cap = paged.cap;
    Ints place;
    for (int i = 0; i < kLanes; ++i) place[i] = i;
    auto score = [=](int64_t t) { return scores + (t / kPanel * rows + row) * kPanel + t % kPanel; };
    auto seen = [=](int64_t t, Floats x, float otherwise) {
      if (t >= low && t + kLanes <= high) return x;
      Ints each = place + int32_t(t);
      return (each >= int32_t(low)) & (each < int32_t(high)) ? x : Floats{} + otherwise;
    };
    Floats most = Floats{} + least;
    for (int64_t t = 0; t < span; t += kLanes) {
      Floats x = load(score(t)) * scale;
      if (cap != 0) x = hyperbolic(x / cap) * cap;
      x = seen(t, x, least);
      store(x, score(t));
      most = x > most ? x : most;
    }
    float top = std::max(tops[r], largest(most));
    Floats sum{};
    for (int64_t t = 0; t < span; t += kLanes) {
      Floats weight = seen(t, exponential(load(score(t)) - top), 0.0f);
      sum += weight;
      store(weight, into + t);
    }
    float decay = std::exp(tops[r] - top);
    tops[r] = top, sums[r] = sums[r] * decay + total(sum);
    return decay;
  }

  // ``rows`` rows of queries from r on over the block of ``count`` keys from token ``first`` on; the first query of
  // the tile is at ``position``.
  void strip(const Paged& paged, int64_t r, int64_t rows, int64_t position, int64_t first, int64_t count) {
    auto end = [&](int64_t row) { return std::min(count, position + row / paged.group + 1 - first); };
    auto begin = [&](int64_t row) {
      int64_t oldest = position + row / paged.group + 1 - paged.window - first;
      return paged.window ? std::max<int64_t>(0, oldest) : 0;
    };
    int64_t low = begin(r) / kPanel * kPanel, high = end(r + rows - 1), inner = size / kWide;
    int64_t span = (high - low + kLanes - 1) / kLanes * kLanes;
    if (low >= high) return;
    Strip<F> multiply = strip_of<F>(rows, std::make_integer_sequence<int, kStrip>());
    const F* q = reinterpret_cast<const F*>(queries.data() + r * size);
    for (int64_t t = low; t < high; t += kPanel) {
      multiply(q, key_panels.data() + t * inner, inner, scores + (t - low) * rows);
    }
    float decay[kStrip];
    for (int64_t row = 0; row < rows; ++row) {
      decay[row] = weigh(paged, r + row, row, rows, begin(r + row) - low, end(r + row) - low, span);
    }
    const F* given = reinterpret_cast<const F*>(weights);
    for (int64_t part = 0; part < value_parts(); ++part) {
      float some[kStrip * kPanel];
      const float* panel = value_panels.data() + (part * kBlock + low) / kWide * kPanel;
      multiply(given, panel, span / kWide, some);
      for (int64_t row = 0; row < rows; ++row) {
        float* into = mixed.data() + (r + row) * wide_size() + part * kPanel;
        for (int64_t d = 0; d < kPanel; d += kLanes) {
          Floats x = load(into + d) * decay[row] + load(some + row * kPanel + d);
          store(x, into + d);
        }
      }
    }
  }

  void finish(const Prompts<X, T>& all, int64_t row, int64_t head, int64_t from) {
    Output out{all.out, std::is_same_v<X, float>};
    for (int64_t r = 0; r < many; ++r) {
      int64_t token = row * all.tokens + from + r / all.at.group;
      float *x = mixed.data() + r * wide_size(), share = 1 / sums[r];
      for (int64_t d = 0; d < size; ++d) x[d] *= share;
      put_row(x, out, (token * all.query_heads() + head * all.at.group + r % all.at.group) * size, size);
    }
  }
};

// The query tokens from .. to - 1 of a row, for the group of one key head.
template <typename X, typename T>
void attend_tile(const Prompts<X, T>& all, int64_t row, int64_t head, int64_t from, int64_t to) {
  const Paged& at = all.at;
  int64_t block = at.group * at.head_dim, start = std::max(all.starts[row], 0), last = std::min(to, all.counted(row));
  for (int64_t i = std::max(from, last); i < to; ++i) {  // padding
    X* out = all.out + ((row * all.tokens + i) * at.kv_heads + head) * block;
    std::fill(out, out + block, X{});
  }
  if (from >= last) return;
  // Behind a pointer, or the compiler asks for the thread's own address in the innermost loops.
  thread_local std::unique_ptr<Tile<X, T>> own = std::make_unique<Tile<X, T>>();
  Tile<X, T>& tile = *own;
  tile.begin(all, row, head, from, last);
  int64_t position = start + from, end = start + last;
  int64_t first = at.window ? std::max<int64_t>(0, position + 1 - at.window) : 0;
  for (; first < end; first += tile.kBlock) {
    int64_t count = std::min<int64_t>(tile.kBlock, end - first);
    tile.pack_block(all, row, head, first, count);
    for (int64_t r = 0; r < tile.many; r += kStrip) {
      tile.strip(at, r, std::min<int64_t>(kStrip, tile.many - r), position, first, count);
    }
  }
  tile.finish(all, row, head, from);
}

// Writes all new keys and values, and then attends over pages.
template <typename X, typename T>
void prefill(const Pool& pool, const Prompts<X, T>& all) {
  constexpr int64_t kPiece = 16, kTileRows = 192, kSmallWork = 1 << 16;
  const Paged& at = all.at;
  int64_t tokens = all.rows * all.tokens, pieces = (tokens + kPiece - 1) / kPiece;
  if (!tokens) return;
  spread(pool, pieces, pieces < 4, [=, &all](int64_t i) {
    for (int64_t t = i * kPiece; t < std::min(tokens, (i + 1) * kPiece); ++t) write_token(all, t);
  });
  // Larger tiles pack the same keys less often, but give many threads less to share.
  int64_t parts = (4 * pool.size() - 1) / (all.rows * at.kv_heads) + 1;
  int64_t step = std::min(std::max<int64_t>(1, kTileRows / at.group), (all.tokens - 1) / parts + 1);
  int64_t tiles = (all.tokens + step - 1) / step, work = tokens * at.group * at.kv_heads * at.head_dim;
  spread(pool, all.rows * at.kv_heads * tiles, work < kSmallWork, [=, &all](int64_t i) {
    int64_t from = (tiles - 1 - i % tiles) * step;  // those that see most come first
    attend_tile(all, i / tiles / at.kv_heads, i / tiles % at.kv_heads, from, std::min(all.tokens, from + step));
  });
}

}  // namespace
