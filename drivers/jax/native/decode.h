// Attention of one new token per row over pages, which are read where they lie: all scores of a row's heads first,
// then their softmax, then the values. That of many tokens is in prompts.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common.h"
#include "scores.h"

namespace {

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

}  // namespace
