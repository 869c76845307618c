// The kernels on a thread pool of its own, for sanitizers: odd sizes, results compared with plain loops.
#include "kernels.cc"

#include <cstdio>
#include <cstdlib>
#include <mutex>
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
    for (bool paired : {false, true}) {
      for (int32_t window : {0, 5}) {
        try_attention<float>(window, paired, kFloat32);
        try_attention<bfloat16>(window, paired, kBfloat16);
      }
    }
  }
}
