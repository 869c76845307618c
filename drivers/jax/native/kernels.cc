// Kernels for the CPU behind XLA's foreign function interface: products, and paged attention for one new token per
// row, and for many (prompts.h). Compiled by build.py on first use for the machine it runs on.
//
// Weights are read once and as they lie, [out, in], in float32, bfloat16 or int8; sums are float32. Products with
// few rows are here, those with many in packed.h, and pairs of bfloat16 in pairs.h. Work is cut into blocks that
// threads of XLA's own pool take from a counter, so that no second pool competes with it. XLA's C interface is used
// as it is: its C++ one takes seconds to compile.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "calls.h"
#include "choose.h"
#include "common.h"
#include "packed.h"
#include "pairs.h"
#include "passes.h"
#include "prompts.h"

namespace {

// --- products with few rows ----------------------------------------------------------------------------------

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

// --- paged attention -----------------------------------------------------------------------------------------

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

// Where the tokens first .. length - 1 of a row lie, for ``heads`` key heads from ``head`` on.
template <typename T>
struct Tokens {
  const T *keys, *values;
  const int32_t* table;
  int64_t head, heads, first, length;

  int64_t pages(const Paged& at) const { return (length - 1) / at.page_tokens - first / at.page_tokens + 1; }

  const T* page(const T* from, int64_t number, const Paged& at) const {
    int64_t page = std::clamp<int64_t>(table[first / at.page_tokens + number], 0, at.pages - 1);
    return from + (page * at.kv_heads + head) * at.page_tokens * at.head_dim;
  }

  // Fetches the page of this number, the keys' before the values'; what is left of the number where there are fewer.
  int64_t fetch_page(int64_t number, const Paged& at) const {
    int64_t many = pages(at);
    if (number >= 2 * many) return number - 2 * many;
    const T* from = number < many ? page(keys, number, at) : page(values, number - many, at);
    int64_t size = heads * at.page_tokens * at.head_dim;
    for (int64_t i = 0; i < size; i += 64 / int64_t(sizeof(T))) fetch(from + i, 0);
    return -1;
  }
};

// The query heads q [heads, group, head_dim] of some key heads -> out like q. ``next`` are the tokens after these.
template <typename X, typename T>
void attend(const X* q, const Tokens<T>& now, const Tokens<T>& next, const Paged& at, std::vector<float>& scores,
            float* out) {
  int64_t count = now.length - now.first, stride = (count + kLanes - 1) / kLanes * kLanes, number = 0;
  int64_t size = at.group * at.head_dim, block = at.page_tokens * at.head_dim;
  int64_t far = std::max<int64_t>(1, kAhead / (now.heads * block * int64_t(sizeof(T))));
  scores.resize(now.heads * at.group * stride);
  std::fill(out, out + now.heads * size, 0.0f);
  auto each = [&](const T* from, auto&& visit) {
    for (int64_t t = now.first; t < now.length; ++number) {
      int64_t place = t % at.page_tokens, many = std::min(at.page_tokens - place, now.length - t);
      int64_t left = now.fetch_page(number + far, at);
      if (left >= 0 && next.length > 0) next.fetch_page(left, at);
      const T* page = now.page(from, t / at.page_tokens - now.first / at.page_tokens, at) + place * at.head_dim;
      for (int64_t h = 0; h < now.heads; ++h) {
        visit(h, page + h * block, many, scores.data() + h * at.group * stride + t - now.first);
      }
      t += many;
    }
  };
  each(now.keys, [&](int64_t h, const T* keys, int64_t many, float* into) {
    score(q + h * size, keys, many, stride, at, into);
  });
  softmax(scores.data(), now.heads * at.group, count, stride, at);
  each(now.values, [&](int64_t h, const T* values, int64_t many, const float* weights) {
    int64_t d = 0;
    float* mixed = out + h * size;
    for (; d + 4 * kLanes <= at.head_dim; d += 4 * kLanes) {
      mix_heads<4>(weights, stride, values + d, many, at, mixed + d);
    }
    for (; d < at.head_dim; d += kLanes) mix_heads<1>(weights, stride, values + d, many, at, mixed + d);
  });
}

// Keys and values of one row, of the key heads from ``head`` on, to the place in their pages.
template <typename X, typename T>
void write(const X* k, const X* v, int64_t where, int64_t heads, const Paged& at, T* keys, T* values) {
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t d = 0; d < at.head_dim; ++d) {
      narrow(widen(k[h * at.head_dim + d]), keys + where + h * at.page_tokens * at.head_dim + d);
      narrow(widen(v[h * at.head_dim + d]), values + where + h * at.page_tokens * at.head_dim + d);
    }
  }
}

template <typename X, typename T>
void decode(const Pool& pool, int64_t rows, const X* q, const X* k, const X* v, T* keys, T* values,
            const int32_t* tables, const int32_t* lengths, const int32_t* pages, const int32_t* offsets, X* out,
            const Paged& at) {
  // Queries are widened unless the kernel multiplies them as they are.
  constexpr bool kAsIs = std::is_same_v<X, float> || (kPaired && std::is_same_v<T, bfloat16>);
  using Query = std::conditional_t<kAsIs, X, float>;
  // A row's heads lie side by side in a page, and are read in one go where rows keep all threads busy.
  int64_t heads = rows < 2 * pool.size() ? 1 : at.kv_heads, parts = at.kv_heads / heads;
  int64_t size = heads * at.group * at.head_dim;
  auto find = [=](int64_t i) -> Tokens<T> {
    if (i >= rows * parts) return {};
    int64_t row = i / parts, length = std::min<int64_t>(lengths[row], at.width * at.page_tokens);
    int64_t first = at.window && length > at.window ? length - at.window : 0;
    return {keys, values, tables + row * at.width, i % parts * heads, heads, first, length};
  };
  spread(pool, rows * parts, rows * at.kv_heads < 3, [=](int64_t i) {
    int64_t row = i / parts, head = i % parts * heads;
    if (pages[row] >= 0 && pages[row] < at.pages && offsets[row] >= 0 && offsets[row] < at.page_tokens) {
      int64_t where = ((pages[row] * at.kv_heads + head) * at.page_tokens + offsets[row]) * at.head_dim;
      write(k + i * heads * at.head_dim, v + i * heads * at.head_dim, where, heads, at, keys, values);
    }
    thread_local std::vector<float> scores, mixed;
    thread_local std::vector<Query> wide;
    mixed.assign(size, 0.0f);
    const Query* given;
    if constexpr (kAsIs) {
      given = q + i * size;
    } else {
      wide.resize(size);
      for (int64_t d = 0; d < size; ++d) wide[d] = widen(q[i * size + d]);
      given = wide.data();
    }
    Tokens<T> now = find(i);
    if (now.length > 0) attend(given, now, find(i + 1), at, scores, mixed.data());
    for (int64_t d = 0; d < size; ++d) narrow(mixed[d], out + i * size + d);
  });
}

// --- calls ---------------------------------------------------------------------------------------------------

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

// Rows x times weights w of the same length: packed if there are more than ``few`` rows.
template <typename X, typename W>
void multiply(const Pool& pool, const void* x, const void* w, Output y, int64_t count, int64_t inner, int64_t outer,
              int64_t few) {
  const X* rows = static_cast<const X*>(x);
  if (count > few) {
    ManyRows<X>{rows, y, count, inner, outer}.template spread_over<W>(pool, w);
  } else {
    Product<X>{rows, y, count, inner, outer, kAhead}.template spread_over<W>(pool, w);
  }
}

// x [rows, in] times w [out, in] -> y [rows, out].
XLA_FFI_Error* product(const Call& call) {
  constexpr int64_t kFew = 31, kFewPairs = 64;  // packing pays from more rows on
  if (!call.has(2, 1, 0)) return call.invalid("product takes x and w, and gives y");
  XLA_FFI_Buffer &x = call.arg(0), &w = call.arg(1), &y = call.ret(0);
  if (x.rank != 2 || w.rank != 2 || x.dims[1] != w.dims[1] || !floating(x) || !floating(y) ||
      !shaped(y, y.dtype, {x.dims[0], w.dims[0]})) {
    return call.invalid("product takes x [rows, in] and w [out, in], x and y float32 or bfloat16");
  }
  int64_t count = x.dims[0], inner = x.dims[1], outer = w.dims[0];
  Pool pool = call.pool();
  Output into{y.data, y.dtype == kFloat32};
#if defined(LLMOS_PAIRS)
  if (x.dtype == kBfloat16 && w.dtype == kBfloat16 && inner % 2 == 0) {
    multiply<Pair, Pair>(pool, x.data, w.data, into, count, inner / 2, outer, kFewPairs);
    return nullptr;
  }
#endif
  const float* wide = static_cast<const float*>(x.data);
  std::unique_ptr<float[]> scratch;
  if (x.dtype == kBfloat16) {
    scratch.reset(new float[count * inner]);
    widen_all(pool, static_cast<const bfloat16*>(x.data), count * inner, scratch.get());
    wide = scratch.get();
  }
  switch (w.dtype) {
    case kFloat32: multiply<float, float>(pool, wide, w.data, into, count, inner, outer, kFew); break;
    case kBfloat16: multiply<float, bfloat16>(pool, wide, w.data, into, count, inner, outer, kFew); break;
    case XLA_FFI_DataType_S8: multiply<float, int8_t>(pool, wide, w.data, into, count, inner, outer, kFew); break;
    default: return call.invalid("weights must be float32, bfloat16 or int8");
  }
  return nullptr;
}

// q [B, heads, head_dim], k and v [B, kv_heads, head_dim]; a cache; tables [B, width], lengths, pages and offsets [B]
// -> out like q, the cache.
XLA_FFI_Error* attention(const Call& call) {
  if (!call.has(9, call.frame->rets.size == 2 ? 2 : 3, 4)) {
    return call.invalid("attention takes 9 arguments and 4 attributes");
  }
  XLA_FFI_Buffer &q = call.arg(0), &k = call.arg(1);
  if (q.rank != 3 || k.rank != 3 || q.dims[2] % kLanes || k.dims[1] <= 0 || q.dims[1] % k.dims[1] || !floating(q) ||
      !shaped(k, q.dtype, {q.dims[0], k.dims[1], q.dims[2]}) ||
      !shaped(call.arg(2), q.dtype, {k.dims[0], k.dims[1], k.dims[2]}) ||
      !shaped(call.ret(0), q.dtype, {q.dims[0], q.dims[1], q.dims[2]})) {
    return call.invalid("attention takes q [B, heads, head_dim], k and v [B, kv_heads, head_dim], float32 or bfloat16");
  }
  int64_t rows = q.dims[0], kv_heads = k.dims[1], page_tokens = call.attr<int32_t>(1), head_dim = q.dims[2];
  Cache cache = Cache::of(call, 3, kv_heads, page_tokens, head_dim);
  if (const char* wrong = cache.wrong(call, kv_heads, page_tokens, head_dim)) return call.invalid(wrong);
  XLA_FFI_Buffer& tables = call.arg(5);
  bool places = tables.rank == 2 && shaped(tables, kInt32, {rows, tables.dims[1]});
  for (int i = 6; i < 9; ++i) places = places && shaped(call.arg(i), kInt32, {rows});
  if (!places) return call.invalid("attention takes tables [B, width], lengths, pages and offsets [B], all int32");
  Paged at{cache.pages,           kv_heads,           page_tokens, head_dim, q.dims[1] / kv_heads, tables.dims[1],
           call.attr<float>(2), call.attr<float>(0), call.attr<int32_t>(3)};
  typed(q.dtype == kFloat32, cache.wide(), [&](auto x, auto t) {
    using X = decltype(x);
    using T = decltype(t);
    decode(call.pool(), rows, call.data<X>(0), call.data<X>(1), call.data<X>(2), cache.key_data<T>(),
           cache.value_data<T>(), call.data<int32_t>(5), call.data<int32_t>(6), call.data<int32_t>(7),
           call.data<int32_t>(8), static_cast<X*>(call.ret(0).data), at);
  });
  return nullptr;
}

// heads [R, C, heads + 2 kv_heads, head_dim], queries, keys and values before their rotation by cos and sin
// [R, C, n / 2]; a cache; tables [R, width], starts and lengths [R], pages and offsets [R, C] -> out [R, C, heads,
// head_dim], the cache.
XLA_FFI_Error* prompts(const Call& call) {
  if (!call.has(10, call.frame->rets.size == 2 ? 2 : 3, 5)) {
    return call.invalid("prompts takes 10 arguments and 5 attributes");
  }
  XLA_FFI_Buffer &heads = call.arg(0), &cos = call.arg(1), &out = call.ret(0), &tables = call.arg(5);
  int64_t kv_heads = call.attr<int32_t>(1), page_tokens = call.attr<int32_t>(2);
  int64_t own = heads.rank == 4 ? heads.dims[2] - 2 * kv_heads : 0;
  if (kv_heads <= 0 || own <= 0 || own % kv_heads || heads.dims[3] % kLanes || !floating(heads) ||
      !shaped(out, heads.dtype, {heads.dims[0], heads.dims[1], own, heads.dims[3]})) {
    return call.invalid("prompts takes heads [R, C, heads + 2 kv_heads, head_dim], float32 or bfloat16");
  }
  int64_t rows = heads.dims[0], tokens = heads.dims[1], head_dim = heads.dims[3];
  int64_t half = cos.rank == 3 ? cos.dims[2] : head_dim;
  if (2 * half > head_dim || !shaped(cos, kFloat32, {rows, tokens, half}) ||
      !shaped(call.arg(2), kFloat32, {rows, tokens, half})) {
    return call.invalid("prompts takes cos and sin [R, C, n / 2] in float32, n at most head_dim");
  }
  Cache cache = Cache::of(call, 3, kv_heads, page_tokens, head_dim);
  if (const char* wrong = cache.wrong(call, kv_heads, page_tokens, head_dim)) return call.invalid(wrong);
  bool places = tables.rank == 2 && shaped(tables, kInt32, {rows, tables.dims[1]});
  places = places && shaped(call.arg(6), kInt32, {rows}) && shaped(call.arg(7), kInt32, {rows});
  places = places && shaped(call.arg(8), kInt32, {rows, tokens}) && shaped(call.arg(9), kInt32, {rows, tokens});
  if (!places) {
    return call.invalid("prompts takes tables [R, width], starts and lengths [R], pages and offsets [R, C], all int32");
  }
  Paged at{cache.pages,         kv_heads,           page_tokens, head_dim, own / kv_heads, tables.dims[1],
           call.attr<float>(3), call.attr<float>(0), call.attr<int32_t>(4)};
  typed(heads.dtype == kFloat32, cache.wide(), [&](auto x, auto t) {
    using X = decltype(x);
    using T = decltype(t);
    prefill(call.pool(), Prompts<X, T>{at, rows, tokens, half, call.data<X>(0), call.data<float>(1),
                                       call.data<float>(2), cache.key_data<T>(), cache.value_data<T>(),
                                       call.data<int32_t>(5), call.data<int32_t>(6), call.data<int32_t>(7),
                                       call.data<int32_t>(8), call.data<int32_t>(9), static_cast<X*>(out.data)});
  });
  return nullptr;
}

// x [rows, 2 n] -> y [rows, n], the first half of a row, activated, times the second; by silu, or by gelu with tanh.
XLA_FFI_Error* gate(const Call& call) {
  if (!call.has(1, 1, 1)) return call.invalid("gate takes x and an attribute, and gives y");
  XLA_FFI_Buffer &x = call.arg(0), &y = call.ret(0);
  if (x.rank != 2 || !floating(x) || x.dims[1] % 2 || !shaped(y, x.dtype, {x.dims[0], x.dims[1] / 2})) {
    return call.invalid("gate takes x [rows, 2 n] in float32 or bfloat16, and gives y [rows, n]");
  }
  if (!x.dims[0] || !x.dims[1]) return nullptr;
  bool smooth = call.attr<int32_t>(0);
  typed(x.dtype == kFloat32, true, [&](auto number, auto) {
    using X = decltype(number);
    auto rows = [&](auto act) {
      gate_rows(call.pool(), call.data<X>(0), static_cast<X*>(y.data), x.dims[0], x.dims[1] / 2, act);
    };
    if (smooth) {
      rows([](Floats x) { return gelu_tanh(x); });
    } else {
      rows([](Floats x) { return silu(x); });
    }
  });
  return nullptr;
}

// Answers XLA's question for the version of its interface, or does the work.
XLA_FFI_Error* answer(XLA_FFI_CallFrame* frame, XLA_FFI_Error* (*work)(const Call&)) {
  auto* extension = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start);
  if (extension && extension->extension_base.type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Api_Version& version = extension->metadata->api_version;
    version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    extension->metadata->traits = 0;
    extension->metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
    return nullptr;
  }
  return work({frame});
}

}  // namespace

extern "C" XLA_FFI_Error* llmos_product(XLA_FFI_CallFrame* frame) { return answer(frame, product); }
extern "C" XLA_FFI_Error* llmos_attention(XLA_FFI_CallFrame* frame) { return answer(frame, attention); }
extern "C" XLA_FFI_Error* llmos_prompts(XLA_FFI_CallFrame* frame) { return answer(frame, prompts); }
extern "C" XLA_FFI_Error* llmos_gate(XLA_FFI_CallFrame* frame) { return answer(frame, gate); }
extern "C" XLA_FFI_Error* llmos_choose(XLA_FFI_CallFrame* frame) { return answer(frame, choose); }
