// Kernels for the CPU behind XLA's foreign function interface: products (products.h), paged attention for one new
// token per row (decode.h) and for many (prompts.h), and gated activations (passes.h). Here is checked what XLA hands
// to them. Compiled by build.py on first use for the machine it runs on.
//
// Weights lie as [out, in], in float32, bfloat16 or int8; sums are float32. Work is cut into blocks that threads of
// XLA's own pool take from a counter, so that no second pool competes with it. XLA's C interface is used as it is: its
// C++ one takes seconds to compile.

#include <cstdint>
#include <memory>

#include "calls.h"
#include "choose.h"
#include "common.h"
#include "decode.h"
#include "pairs.h"
#include "passes.h"
#include "products.h"
#include "prompts.h"

namespace {

// x [rows, in] times w [out, in] -> y [rows, out].
XLA_FFI_Error* product(const Call& call) {
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
    multiply<Pair, Pair>(pool, x.data, w.data, into, count, inner / 2, outer);
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
    case kFloat32: multiply<float, float>(pool, wide, w.data, into, count, inner, outer); break;
    case kBfloat16: multiply<float, bfloat16>(pool, wide, w.data, into, count, inner, outer); break;
    case XLA_FFI_DataType_S8: multiply<float, int8_t>(pool, wide, w.data, into, count, inner, outer); break;
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

}  // namespace

extern "C" XLA_FFI_Error* llmos_product(XLA_FFI_CallFrame* frame) { return answer(frame, product); }
extern "C" XLA_FFI_Error* llmos_attention(XLA_FFI_CallFrame* frame) { return answer(frame, attention); }
extern "C" XLA_FFI_Error* llmos_prompts(XLA_FFI_CallFrame* frame) { return answer(frame, prompts); }
extern "C" XLA_FFI_Error* llmos_gate(XLA_FFI_CallFrame* frame) { return answer(frame, gate); }
extern "C" XLA_FFI_Error* llmos_choose(XLA_FFI_CallFrame* frame) { return answer(frame, choose); }
