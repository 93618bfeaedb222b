// y = act(x weight^T + bias). Of few rows, as in a transformer's decoding, the weight is read once,
// where it lies, and the speed is memory's; of more, x is packed, and a task multiplies it by its
// part of the weight; of many, the weight is packed, and a task multiplies its rows by it. A row's
// sums do not depend on the threads.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/linear/columns.h"
#include "cpu/microkernel.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/transpose.h"

namespace genfast::cpu {
namespace {

// ---- few rows -------------------------------------------------------------------------------

constexpr int kFew = 16;
constexpr int kRows = 4;     // of x at a time
constexpr int kOutputs = 4;  // 4 x 4 chains of sums

// R outputs of M rows: columns in lanes, summed up at the end.
template <int M, int R>
void block(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t K, const float* bias,
           bool relu, float* y, int64_t ldy) {
  f32v sums[M][R] = {};
  for (int64_t k = 0; k < K; k += W) {
    f32v v[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) v[r] = load(w + r * ldw + k);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const f32v a = load(x + m * ldx + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[m][r] = fused_multiply_add(a, v[r], sums[m][r]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) {
      const float sum = horizontal_sum(sums[m][r]) + (bias == nullptr ? 0.0f : bias[r]);
      y[m * ldy + r] = relu && sum <= 0.0f ? 0.0f : sum;
    }
}

// The first m rows, at most M.
template <int M, int R, class... Rest>
void rows(int64_t m, Rest... rest) {
  if (m >= M)
    block<M, R>(rest...);
  else if constexpr (M > 1)
    rows<M - 1, R>(m, rest...);
}

void few(const LinearParams& p) {
  const int64_t M = p.x.shape[0], K = p.x.shape[1], N = p.weight.shape[0];
  const int64_t ldx = p.x.strides[0], ldw = p.weight.strides[0];
  const float* x = static_cast<const float*>(p.x.data);
  const float* w = static_cast<const float*>(p.weight.data);
  const float* bias = static_cast<const float*>(p.bias.data);
  float* y = static_cast<float*>(p.y.data);
  // A second thread costs 2 us, in which one reads 60 KB.
  const int threads = N * K < 1 << 15 ? 1 : p.threads;
  const int64_t parts = workers(threads, (N + 15) / 16);
  parallel_for(parts, threads, [&](int64_t part) {
    const auto begin_of = [&](int64_t i) { return std::min(N, (N * i / parts + 15) / 16 * 16); };
    const int64_t end = begin_of(part + 1);
    for (int64_t o = begin_of(part); o < end; o += kOutputs) {
      const float* shift = bias == nullptr ? nullptr : bias + o;
      for (int64_t m = 0; m < M; m += kRows) {
        const float* a = x + m * ldx;
        float* to = y + m * N + o;
        if (end - o >= kOutputs)
          rows<kRows, kOutputs>(M - m, a, ldx, w + o * ldw, ldw, K, shift, p.relu, to, N);
        else
          for (int64_t r = 0; r < end - o; ++r)
            rows<kRows, 1>(M - m, a, ldx, w + (o + r) * ldw, ldw, K,
                           shift == nullptr ? nullptr : shift + r, p.relu, to + r, N);
      }
    }
  });
}

// ---- some rows ------------------------------------------------------------------------------

constexpr int64_t kSome = 256;         // rows up to which they are the lanes
constexpr int64_t kInputs = 256;       // of a panel: 32 KiB at AVX-512
constexpr int64_t kMostOutputs = 256;  // of a task: their sums over 128 rows take 144 KiB

// Rows [0, n) of x and `depth` of their inputs: [input][NR], zeros up to whole vectors.
void pack(const float* x, int64_t ld, int64_t n, int64_t depth, float* to) {
  for (int64_t c = 0; c < n; c += W) {
    const int count = static_cast<int>(std::min<int64_t>(W, n - c));
    const float* from = x + c * ld;
    int64_t k = 0;
    for (; k + W <= depth; k += W) {
      f32v v[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) v[r] = r < count ? load(from + r * ld + k) : f32v{};
      transpose(v);
#pragma GCC unroll 16
      for (int t = 0; t < W; ++t) store(to + (k + t) * NR + c, v[t]);
    }
    for (; k < depth; ++k)
      for (int r = 0; r < W; ++r) to[k * NR + c + r] = r < count ? from[r * ld + k] : 0.0f;
  }
}

// sums [n][ld], a row an output: their columns [0, rows) to rows of y, with bias and activation.
void finish(const float* sums, int64_t ld, int64_t n, int64_t rows, const float* bias, bool relu,
            float* y, int64_t ldy) {
  for (int64_t o = 0; o < n; o += W) {
    const int count = static_cast<int>(std::min<int64_t>(W, n - o));
    float shift[W] = {};
    if (bias != nullptr) std::copy_n(bias + o, count, shift);
    for (int64_t m = 0; m < rows; m += W) {
      f32v v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = load(sums + (o + i) * ld + m);
      transpose(v);
      for (int t = 0; t < W && m + t < rows; ++t) {
        f32v z = v[t] + load(shift);
        if (relu) z = select(z <= 0.0f, f32v{}, z);
        float* to = y + (m + t) * ldy + o;
        if (count == W)
          store(to, z);
        else
          for (int i = 0; i < count; ++i) to[i] = z[i];
      }
    }
  }
}

// The rows of x are the lanes of a product: a weight of more rows than that is the one not packed.
void some(const LinearParams& p) {
  const int64_t M = p.x.shape[0], K = p.x.shape[1], N = p.weight.shape[0];
  const int64_t of_output = p.weight.strides[0], of_input = p.weight.strides[1];
  const bool rows_of_inputs = of_input == 1 || K <= 1;
  const float* x = static_cast<const float*>(p.x.data);
  const float* w = static_cast<const float*>(p.weight.data);
  const int64_t panels = (M + NR - 1) / NR, blocks = (K + kInputs - 1) / kInputs;
  const Memory memory(4 * panels * NR * K);
  float* packed = reinterpret_cast<float*>(memory.data());  // [block][panel][input][NR]
  const auto depth_of = [=](int64_t k) { return std::min(kInputs, K - k); };
  parallel_for(panels * blocks, p.threads, Order::in_order, [&](int64_t task) {
    const int64_t k = task / panels * kInputs, m = task % panels * NR;
    pack(x + m * p.x.strides[0] + k, p.x.strides[0], std::min<int64_t>(NR, M - m), depth_of(k),
         packed + k * panels * NR + m * depth_of(k));
  });

  // Equal tasks, a multiple of the threads; whole groups of four outputs.
  const int64_t most = kMostOutputs * p.threads;
  const int64_t tasks = std::max<int64_t>(1, (N + most - 1) / most) * p.threads;
  const int64_t outputs = round_up((N + tasks - 1) / tasks, 4);
  const int64_t ld = odd_lines(panels * NR), lda = odd_lines(outputs);
  Slots slots(workers(p.threads, tasks),
              4 * (round_up(outputs, W) * ld + (rows_of_inputs ? 0 : kInputs * lda)));
  parallel_for(tasks, p.threads, Order::in_order, [&](int64_t task) {
    const int64_t o = task * outputs, n = std::min(outputs, N - o);
    if (n <= 0) return;
    slots.with([&](char* base) {
      float* sums = reinterpret_cast<float*>(base);       // [output][ld]
      float* columns = sums + round_up(outputs, W) * ld;  // [input][lda]
      for (int64_t k = 0; k < K || k == 0; k += kInputs) {
        const int64_t depth = depth_of(k);
        const float* a = w + o * of_output + k * of_input;
        if (!rows_of_inputs) copy_columns(a, of_input, depth, n, columns, lda);
        for (int64_t m = 0; m < M; m += NR) {
          const int rows = static_cast<int>(std::min<int64_t>(NR, M - m));
          const float* panel = packed + k * panels * NR + m * depth;
          const auto store = store_rows(sums + m, ld, k > 0);
          if (rows_of_inputs)
            multiply<false>(static_cast<int>(n), rows, depth, a, of_output, panel, NR, store);
          else
            multiply<true>(static_cast<int>(n), rows, depth, columns, lda, panel, NR, store);
        }
      }
      finish(sums, ld, n, M, static_cast<const float*>(p.bias.data) + (p.bias.defined() ? o : 0),
             p.relu, static_cast<float*>(p.y.data) + o, N);
    });
  });
}

// ---- many rows ------------------------------------------------------------------------------

// Of a task: its rows of x stay in L2, 768 KiB of them.
constexpr int64_t kMostRows = 192, kLeastRows = 48, kMostNumbers = 192 * 1024;

// An epilogue: to rows of y, or added to them; after the last inputs bias and activation.
struct Sums {
  float* y;
  int64_t ld;
  bool add, last, relu;
  const float* bias;
  int columns;

  template <int M, int N>
  GENFAST_INLINE void operator()(int row0, f32v (&acc)[M][N]) const {
    float* at = y + row0 * ld;
    alignas(64) float shift[NR] = {};
    if (last && bias != nullptr) std::copy_n(bias, columns, shift);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i, at += ld)
#pragma GCC unroll 2
      for (int c = 0; c < N; ++c) {
        f32v sum = add ? acc[i][c] + load(at + c * W) : acc[i][c];
        if (last) sum += load(shift + c * W);
        if (last && relu) sum = select(sum <= 0.0f, f32v{}, sum);
        store(at + c * W, sum);
      }
  }
};

// The outputs are the lanes: the weight is packed, 4 MiB at a time (memory that the thread keeps:
// fresh pages of 9 MiB took 10 % of 11 ms), x is read where it lies, and sums go to y.
constexpr int64_t kMostPacked = 1 << 20;

void many(const LinearParams& p) {
  const int64_t M = p.x.shape[0], K = p.x.shape[1], N = p.weight.shape[0];
  const int64_t ldx = p.x.strides[0], of_output = p.weight.strides[0],
                of_input = p.weight.strides[1];
  const float* x = static_cast<const float*>(p.x.data);
  const float* w = static_cast<const float*>(p.weight.data);
  const float* bias = static_cast<const float*>(p.bias.data);
  float* y = static_cast<float*>(p.y.data);
  const int64_t blocks = (K + kInputs - 1) / kInputs;
  const auto depth_of = [=](int64_t k) { return std::min(kInputs, K - k); };
  const int64_t at_once = std::max<int64_t>(1, kMostPacked / (NR * K)) * NR;
  const Memory memory(4 * std::min(at_once, round_up(N, NR)) * K);
  float* packed = reinterpret_cast<float*>(memory.data());  // [panel][input][NR]
  const auto pack_panel = [&](int64_t begin, int64_t o, int64_t k) {
    const int64_t count = std::min<int64_t>(NR, N - o), depth = depth_of(k);
    const float* from = w + o * of_output + k * of_input;
    float* to = packed + (o - begin) * K + k * NR;
    if (of_input == 1) return pack(from, of_output, count, depth, to);
    for (int64_t i = 0; i < depth; ++i, from += of_input, to += NR) {
      std::copy_n(from, count, to);
      std::fill(to + count, to + NR, 0.0f);
    }
  };

  // Equal tasks, a multiple of the threads; whole groups of four rows. Where rows do not suffice
  // for all threads a task takes a part of the outputs.
  const int64_t fit = std::max(kLeastRows, kMostNumbers / K);
  const int64_t parts = std::max<int64_t>(1, std::min(p.threads * kLeastRows / M, N / (4 * NR)));
  const int64_t shares = (p.threads + parts - 1) / parts, most = std::min(kMostRows, fit) * shares;
  const int64_t groups = (M + most - 1) / most * shares;
  const int64_t rows = round_up((M + groups - 1) / groups, 4);
  // Rows a multiple of 2 KiB apart would share two of the 64 sets of L1 (K = 3072: 1.4 times as
  // long), so they are copied apart; of few outputs the copy costs as much.
  const bool apart = ldx % 512 == 0 && N >= 4 * NR;
  const int64_t lda = apart ? odd_lines(K) : ldx;
  Slots slots(workers(p.threads, groups * parts), 4 * rows * (NR + (apart ? lda : 0)));
  for (int64_t begin = 0; begin < N; begin += at_once) {
    const int64_t end = std::min(N, begin + at_once), panels = (end - begin + NR - 1) / NR;
    parallel_for(panels * blocks, p.threads, Order::in_order, [&](int64_t task) {
      pack_panel(begin, begin + task / blocks * NR, task % blocks * kInputs);
    });
    parallel_for(groups * parts, p.threads, Order::in_order, [&](int64_t task) {
      const int64_t m = task / parts * rows, part_of = task % parts;
      const int n = static_cast<int>(std::min(rows, M - m));
      if (n <= 0) return;
      slots.with([&](char* base) {
        float* part = reinterpret_cast<float*>(base);  // of the last outputs, no whole vectors
        float* copies = part + rows * NR;
        const float* a = x + m * ldx;
        for (int r = 0; r < n && apart; ++r) std::copy_n(a + r * ldx, K, copies + r * lda);
        if (apart) a = copies;
        const int64_t last = begin + panels * (part_of + 1) / parts * NR;
        for (int64_t o = begin + panels * part_of / parts * NR; o < last; o += NR) {
          const int columns = static_cast<int>(std::min<int64_t>(NR, N - o));
          const bool whole = columns % W == 0;
          const float* panel = packed + (o - begin) * K;
          for (int64_t k = 0; k < K; k += kInputs) {
            const Sums to{whole ? y + m * N + o : part,
                          whole ? N : NR,
                          k > 0,
                          k + kInputs >= K,
                          p.relu,
                          bias == nullptr ? nullptr : bias + o,
                          columns};
            multiply<false>(n, columns, depth_of(k), a + k, lda, panel + k * NR, NR, to);
          }
          for (int r = 0; r < n && !whole; ++r)
            std::copy_n(part + r * NR, columns, y + (m + r) * N + o);
        }
      });
    });
  }
}

}  // namespace

namespace GENFAST_ISA {

void linear(const LinearParams& p) {
  const bool in_place = p.x.shape[1] % 16 == 0 && p.weight.strides[1] == 1;
  if (p.x.shape[0] <= kFew && in_place) return few(p);
  if (p.x.shape[0] <= kSome || p.x.shape[1] == 0) return some(p);
  many(p);
}

}  // namespace GENFAST_ISA
}  // namespace genfast::cpu
