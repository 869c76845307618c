// Choosing the next token of each row: greedily, or with temperature, top-k, top-p, min-p and noise.
//
// No row is sorted, and no noise is made but of what can still win.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "calls.h"
#include "candidates.h"
#include "common.h"
#include "noise.h"

namespace {

// Where the largest of a row is, the first of equals; -1 if it is not finite, or not all are numbers.
inline int32_t greediest(const float* logits, int64_t vocab) {
  Largest all;
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes) all.see(load(logits + i));
  for (; i < vocab; ++i) all.see(Floats{} + logits[i]);
  return all.sound() ? find(logits, vocab, all.top()) : -1;
}

// What rows ask for, each [rows]; top_k and top_p count only where ``cuts``.
struct Asked {
  const float *temperature, *top_p, *min_p;
  const int32_t *top_k, *position;
  const uint32_t* seed;
  bool cuts;
};

// The token of a row, or -1 if its logits are not sound.
inline int32_t choose_row(const float* logits, int64_t vocab, const Asked& asked, int64_t row) {
  float temperature = asked.temperature[row];
  if (temperature <= 0) return greediest(logits, vocab);
  // Behind a pointer, or the compiler asks for the thread's own address in the innermost loops.
  thread_local std::unique_ptr<Candidates> own = std::make_unique<Candidates>();
  Candidates& those = *own;
  if (!those.heat(logits, vocab, temperature)) return -1;
  if (!(std::abs(those.top) < -kLeast)) return those.first;  // the temperature was too low for floats
  int32_t number = asked.cuts ? asked.top_k[row] : 0;
  float share = asked.cuts ? asked.top_p[row] : 1;
  if (number > 0 && number < vocab) those.cut<false>(number);
  if (share < 1) those.cut<true>(share);
  float floor = those.top + std::log(asked.min_p[row]);
  return those.winner(Noise(asked.seed[row], asked.position[row]), floor);
}

inline void choose_rows(const Pool& pool, const float* logits, int64_t rows, int64_t vocab, const Asked& asked,
                        int32_t* tokens) {
  constexpr int64_t kSmallWork = 1 << 13;
  spread(pool, rows, rows * vocab < kSmallWork,
         [=](int64_t row) { tokens[row] = choose_row(logits + row * vocab, vocab, asked, row); });
}

// logits [B, vocab]; temperature, top_k, top_p, min_p, seed and position [B] -> tokens [B], -1 where
// logits are not sound.
inline XLA_FFI_Error* choose(const Call& call) {
  if (!call.has(7, 1, 1)) return call.invalid("choose takes 7 arguments and an attribute, and gives tokens");
  XLA_FFI_Buffer& logits = call.arg(0);
  int64_t rows = logits.rank == 2 ? logits.dims[0] : 0, vocab = logits.rank == 2 ? logits.dims[1] : 0;
  bool fits = logits.rank == 2 && logits.dtype == kFloat32 && vocab > 0 && vocab < (int64_t{1} << 31) - 64;
  for (int i : {1, 3, 4}) fits = fits && shaped(call.arg(i), kFloat32, {rows});
  for (int i : {2, 6}) fits = fits && shaped(call.arg(i), kInt32, {rows});
  if (!fits || !shaped(call.arg(5), XLA_FFI_DataType_U32, {rows}) || !shaped(call.ret(0), kInt32, {rows})) {
    return call.invalid("choose takes float32 logits [B, vocab], and six numbers for each row");
  }
  Asked asked{call.data<float>(1),   call.data<float>(3),    call.data<float>(4),    call.data<int32_t>(2),
              call.data<int32_t>(6), call.data<uint32_t>(5), bool(call.attr<int32_t>(0))};
  choose_rows(call.pool(), call.data<float>(0), rows, vocab, asked, static_cast<int32_t*>(call.ret(0).data));
  return nullptr;
}

}  // namespace
