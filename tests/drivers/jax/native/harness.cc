// The kernels on a thread pool of its own, for sanitizers: odd sizes, results compared with plain loops.
#include "kernels.cc"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>

namespace {

std::mutex lock;
std::vector<std::thread> threads;
int64_t pool_size = 3;

XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  std::lock_guard<std::mutex> held(lock);
  threads.emplace_back(args->task, args->data);
  return nullptr;
}

XLA_FFI_Error* count_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = pool_size;
  return nullptr;
}

XLA_FFI_Error* refuse(XLA_FFI_Error_Create_Args* args) {
  std::fprintf(stderr, "refused: %s\n", args->message);
  std::exit(1);
}

template <typename T>
XLA_FFI_Buffer buffer(std::vector<T>& data, std::vector<int64_t>& dims, XLA_FFI_DataType type) {
  return {XLA_FFI_Buffer_STRUCT_SIZE, nullptr, type, data.data(), int64_t(dims.size()), dims.data()};
}

void call(XLA_FFI_Error* (*kernel)(XLA_FFI_CallFrame*), std::vector<void*> args, std::vector<void*> rets,
          std::vector<void*> attrs) {
  XLA_FFI_Api api{};
  api.XLA_FFI_ThreadPool_Schedule = schedule;
  api.XLA_FFI_ThreadPool_NumThreads = count_threads;
  api.XLA_FFI_Error_Create = refuse;
  XLA_FFI_CallFrame frame{};
  frame.api = &api;
  frame.args.size = args.size(), frame.args.args = args.data();
  frame.rets.size = rets.size(), frame.rets.rets = rets.data();
  frame.attrs.size = attrs.size(), frame.attrs.attrs = attrs.data();
  kernel(&frame);
  for (auto& thread : threads) thread.join();
  threads.clear();
}

std::mt19937 random_bits(7);

std::vector<float> randoms(int64_t size) {
  std::vector<float> made(size);
  for (float& x : made) x = std::normal_distribution<float>()(random_bits);
  return made;
}

void check(double got, double expected, const char* what, double tolerance = 1e-3) {
  if (std::abs(got - expected) > tolerance * (1 + std::abs(expected))) {
    std::fprintf(stderr, "%s: %g, not %g\n", what, got, expected);
    std::exit(1);
  }
}

template <typename T>
std::vector<T> narrowed(const std::vector<float>& wide) {
  std::vector<T> made(wide.size());
  for (size_t i = 0; i < wide.size(); ++i) narrow(wide[i], &made[i]);
  return made;
}

template <typename T>
void try_product(int64_t rows, int64_t outer, int64_t inner, XLA_FFI_DataType type) {
  auto x = narrowed<T>(randoms(rows * inner)), w = narrowed<T>(randoms(outer * inner));
  auto y = randoms(rows * outer);
  std::vector<int64_t> xd{rows, inner}, wd{outer, inner}, yd{rows, outer};
  auto xb = buffer(x, xd, type), wb = buffer(w, wd, type), yb = buffer(y, yd, kFloat32);
  call(llmos_product, {&xb, &wb}, {&yb}, {});
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < outer; ++o) {
      double sum = 0;
      for (int64_t k = 0; k < inner; ++k) sum += double(widen(x[r * inner + k])) * widen(w[o * inner + k]);
      check(y[r * outer + o], sum, "product");
    }
  }
}

// Two arrays, or one in which the values of a page follow its keys, behind a block that is not this layer's.
template <typename T>
void try_attention(int32_t window, bool paired, XLA_FFI_DataType type) {
  constexpr int64_t B = 3, H = 8, K = 2, D = 16, N = 4, P = 9, W = 4;
  auto some = [](int64_t size) { return narrowed<T>(randoms(size)); };
  auto q = some(B * H * D), k = some(B * K * D), v = k, keys = some(P * K * N * D), out = q;
  auto values = keys;
  std::vector<int32_t> tables{0, 1, 2, 8, 3, 8, 8, 8, 4, 5, 6, 7}, lengths{9, 1, 16}, pages{2, 3, 7}, offsets{0, 0, 3};
  std::vector<int64_t> qd{B, H, D}, kd{B, K, D}, cd{P, K, N, D}, td{B, W}, bd{B};
  auto qb = buffer(q, qd, type), kb = buffer(k, kd, type), vb = buffer(v, kd, type);
  auto cb = buffer(keys, cd, type), db = buffer(values, cd, type), ob = buffer(out, qd, type);
  auto tb = buffer(tables, td, XLA_FFI_DataType_S32), lb = buffer(lengths, bd, XLA_FFI_DataType_S32);
  auto pb = buffer(pages, bd, XLA_FFI_DataType_S32), fb = buffer(offsets, bd, XLA_FFI_DataType_S32);
  float scale = 0.25f, cap = 0;
  int32_t page_tokens = N, first = 1;
  int64_t size = K * N * D;
  auto pool = some((2 * P + first) * size);
  std::vector<int64_t> rd{(2 * P + first) * size}, none;
  std::vector<int32_t> behind{first}, twice = tables, into = pages;
  for (auto* list : {&twice, &into}) {
    for (auto& page : *list) page *= 2;
  }
  for (int64_t i = 0; i < P * size; ++i) {
    pool[(i / size * 2 + first) * size + i % size] = keys[i];
    pool[(i / size * 2 + first + 1) * size + i % size] = values[i];
  }
  auto rb = buffer(pool, rd, type), hb = buffer(behind, none, XLA_FFI_DataType_S32);
  auto wb = buffer(twice, td, XLA_FFI_DataType_S32), ib = buffer(into, bd, XLA_FFI_DataType_S32);
  XLA_FFI_Scalar capped{kFloat32, &cap}, scaled{kFloat32, &scale}, windowed{XLA_FFI_DataType_S32, &window};
  XLA_FFI_Scalar paged{XLA_FFI_DataType_S32, &page_tokens};
  std::vector<void*> attributes{&capped, &paged, &scaled, &windowed};
  if (paired) {
    call(llmos_attention, {&qb, &kb, &vb, &rb, &hb, &wb, &lb, &ib, &fb}, {&ob, &rb}, attributes);
  } else {
    call(llmos_attention, {&qb, &kb, &vb, &cb, &db, &tb, &lb, &pb, &fb}, {&ob, &cb, &db}, attributes);
  }
  for (int64_t i = 0; paired && i < P * size; ++i) {
    keys[i] = pool[(i / size * 2 + first) * size + i % size];
    values[i] = pool[(i / size * 2 + first + 1) * size + i % size];
  }
  for (int64_t i = 0; i < B * H; ++i) {
    int64_t row = i / H, head = i % H / (H / K), first = window ? std::max(0, lengths[row] - window) : 0;
    auto at = [&](int64_t t) { return ((tables[row * W + t / N] * K + head) * N + t % N) * D; };
    std::vector<double> weights;
    double sum = 0;
    for (int64_t t = first; t < lengths[row]; ++t) {
      double score = 0;
      for (int64_t d = 0; d < D; ++d) score += double(widen(q[i * D + d])) * widen(keys[at(t) + d]) * scale;
      weights.push_back(std::exp(score));
      sum += weights.back();
    }
    for (int64_t d = 0; d < D; ++d) {
      double mixed = 0;
      for (int64_t t = first; t < lengths[row]; ++t) mixed += weights[t - first] / sum * widen(values[at(t) + d]);
      check(widen(out[i * D + d]), mixed, "attention", sizeof(T) < 4 ? 1e-2 : 1e-3);
    }
  }
}

// Two rows of new tokens behind some that are there; the second has fewer, the rest of it is padding.
template <typename T>
void try_prompts(int32_t window, int64_t size, XLA_FFI_DataType type) {
  constexpr int64_t R = 2, C = 21, H = 6, K = 2, N = 4, W = 80, P = 2 * W + 1;
  int64_t D = size, half = D / 4;
  std::vector<int32_t> starts{290, 3}, lengths{311, 10}, tables(R * W), pages(R * C, P), offsets(R * C);
  std::iota(tables.rbegin(), tables.rend(), 0);
  for (int64_t i = 0; i < R * C; ++i) {
    int64_t row = i / C, place = starts[row] + i % C;
    offsets[i] = place % N;
    if (place < lengths[row]) pages[i] = tables[row * W + place / N];
  }
  auto heads = narrowed<T>(randoms(R * C * (H + 2 * K) * D)), keys = narrowed<T>(randoms(P * K * N * D));
  std::vector<T> values = keys, out(R * C * H * D);
  auto cos = randoms(R * C * half), sin = randoms(R * C * half);
  std::vector<int64_t> hd{R, C, H + 2 * K, D}, nd{R, C, half}, cd{P, K, N, D}, td{R, W}, rd{R}, pd{R, C}, od{R, C, H, D};
  auto hb = buffer(heads, hd, type), nb = buffer(cos, nd, kFloat32), sb = buffer(sin, nd, kFloat32);
  auto kb = buffer(keys, cd, type), vb = buffer(values, cd, type), ob = buffer(out, od, type);
  auto tb = buffer(tables, td, kInt32), bb = buffer(starts, rd, kInt32), lb = buffer(lengths, rd, kInt32);
  auto pb = buffer(pages, pd, kInt32), fb = buffer(offsets, pd, kInt32);
  float scale = 0.25f, cap = 3;
  int32_t page_tokens = N, kv_heads = K;
  XLA_FFI_Scalar capped{kFloat32, &cap}, scaled{kFloat32, &scale}, windowed{kInt32, &window};
  XLA_FFI_Scalar paged{kInt32, &page_tokens}, grouped{kInt32, &kv_heads};
  call(llmos_prompts, {&hb, &nb, &sb, &kb, &vb, &tb, &bb, &lb, &pb, &fb}, {&ob, &kb, &vb},
       {&capped, &grouped, &paged, &scaled, &windowed});
  auto turned = [&](int64_t token, int64_t head, int64_t d) {
    const T* x = heads.data() + (token * (H + 2 * K) + head) * D;
    if (d >= 2 * half) return widen(x[d]);
    float c = cos[token * half + d % half], s = sin[token * half + d % half];
    T rounded;
    narrow(d < half ? widen(x[d]) * c - widen(x[half + d]) * s : widen(x[d]) * c + widen(x[d - half]) * s, &rounded);
    return widen(rounded);
  };
  for (int64_t i = 0; i < R * C * H; ++i) {
    int64_t token = i / H, row = token / C, position = starts[row] + token % C, head = i % H / (H / K);
    if (position >= lengths[row]) {
      for (int64_t d = 0; d < D; ++d) check(widen(out[i * D + d]), 0, "padding");
      continue;
    }
    int64_t first = window ? std::max<int64_t>(0, position + 1 - window) : 0;
    auto at = [&](int64_t t) { return ((tables[row * W + t / N] * K + head) * N + t % N) * D; };
    std::vector<double> weights;
    double sum = 0;
    for (int64_t t = first; t <= position; ++t) {
      double score = 0;
      for (int64_t d = 0; d < D; ++d) score += double(turned(token, i % H, d)) * widen(keys[at(t) + d]);
      weights.push_back(std::exp(std::tanh(score * scale / cap) * cap));
      sum += weights.back();
    }
    for (int64_t d = 0; d < D; ++d) {
      double mixed = 0;
      for (int64_t t = first; t <= position; ++t) mixed += weights[t - first] / sum * widen(values[at(t) + d]);
      check(widen(out[i * D + d]), mixed, "prompts", sizeof(T) < 4 ? 2e-2 : 1e-3);
    }
    check(widen(keys[at(position) + 1]), turned(token, H + head, 1), "a key that was written", 1e-2);
  }
}

template <typename T>
void try_gate(int64_t rows, int64_t size, int32_t smooth, XLA_FFI_DataType type) {
  auto x = narrowed<T>(randoms(rows * 2 * size));
  std::vector<T> y(rows * size);
  std::vector<int64_t> xd{rows, 2 * size}, yd{rows, size};
  auto xb = buffer(x, xd, type), yb = buffer(y, yd, type);
  XLA_FFI_Scalar kind{kInt32, &smooth};
  call(llmos_gate, {&xb}, {&yb}, {&kind});
  for (int64_t i = 0; i < rows * size; ++i) {
    double a = widen(x[i / size * 2 * size + i % size]), b = widen(x[i / size * 2 * size + size + i % size]);
    double act = smooth ? a / 2 * (1 + std::tanh(0.7978845608 * (a + 0.044715 * a * a * a))) : a / (1 + std::exp(-a));
    check(widen(y[i]), act * b, "gate", sizeof(T) < 4 ? 1e-2 : 1e-3);
  }
}

// A token may be another one only where two come as near to each other as sums of floats are exact.
int32_t chosen(const float* logits, int64_t vocab, float temperature, int32_t top_k, float top_p, float min_p,
               const Noise& noise) {
  std::vector<int32_t> order(vocab);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [=](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (temperature <= 0) return order[0];
  auto heated = [=](int32_t at) { return double(logits[at] / temperature); };
  int64_t count = top_k ? std::min<int64_t>(top_k, vocab) : vocab, best = 0;
  double sum = 0, before = 0, most = -INFINITY;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(heated(order[i]) - heated(order[0]));
  for (int64_t i = 0; i < count; ++i) {
    double share = std::exp(heated(order[i]) - heated(order[0]));
    if (i && (before >= top_p * sum || share < min_p)) break;
    before += share;
    double noisy = heated(order[i]) + Noise::of(noise.bits(uint32_t(order[i])));
    if (noisy > most) most = noisy, best = order[i];
  }
  return int32_t(best);
}

void try_choose(int64_t vocab, float scale) {
  constexpr int64_t B = 5;
  auto logits = randoms(B * vocab);
  for (float& x : logits) x *= scale;
  std::vector<float> temperature{0, 0.8f, 1.3f, 1, 0.5f}, top_p{1, 1, 0.9f, 1, 0.7f}, min_p{0, 0, 0, 0.05f, 0.01f};
  std::vector<int32_t> top_k{0, 0, 0, 40, 400}, position{0, 7, 1 << 30, 9, 2}, tokens(B);
  std::vector<uint32_t> seed{0, 1, ~0u, 77, 5};
  std::vector<int64_t> ld{B, vocab}, rd{B};
  auto lb = buffer(logits, ld, kFloat32), tb = buffer(temperature, rd, kFloat32), kb = buffer(top_k, rd, kInt32);
  auto pb = buffer(top_p, rd, kFloat32), mb = buffer(min_p, rd, kFloat32), ob = buffer(tokens, rd, kInt32);
  auto sb = buffer(seed, rd, XLA_FFI_DataType_U32), ab = buffer(position, rd, kInt32);
  int32_t cuts = 1;
  XLA_FFI_Scalar cutting{kInt32, &cuts};
  call(llmos_choose, {&lb, &tb, &kb, &pb, &mb, &sb, &ab}, {&ob}, {&cutting});
  for (int64_t i = 0; i < B; ++i) {
    check(tokens[i], chosen(logits.data() + i * vocab, vocab, temperature[i], top_k[i], top_p[i], min_p[i],
                            Noise(seed[i], position[i])), "a token", 0);
  }
}

}  // namespace

int main() {
  for (int64_t rows : {1, 2, 5, 9, 100, 140}) {
    for (auto [outer, inner] : {std::pair<int64_t, int64_t>{1, 1}, {37, 83}, {37, 86}, {600, 129}, {600, 130}}) {
      try_product<float>(rows, outer, inner, kFloat32);
      try_product<bfloat16>(rows, outer, inner, kBfloat16);
    }
  }
  for (int64_t many : {1, 3}) {
    pool_size = many;
    for (int32_t window : {0, 5, 270}) {
      try_prompts<float>(window, 48, kFloat32);
      try_prompts<bfloat16>(window, 80, kBfloat16);
    }
    for (int64_t vocab : {1, 37, 1037, 20000}) {
      for (float scale : {0.01f, 3.0f, 100.0f}) try_choose(vocab, scale);
    }
    for (int32_t smooth : {0, 1}) {
      try_gate<float>(40, 1037, smooth, kFloat32);
      try_gate<bfloat16>(3, 37, smooth, kBfloat16);
    }
    for (bool paired : {false, true}) {
      for (int32_t window : {0, 5}) {
        try_attention<float>(window, paired, kFloat32);
        try_attention<bfloat16>(window, paired, kBfloat16);
      }
    }
  }
}
