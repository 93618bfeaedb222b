// dweight = grad^T x. A task owns a block of dweight and sums all rows into it, `kRows` at a time:
// the block's columns of both factors are copied next to each other first, because a stride of
// whole pages would keep them in one set of the cache. So no two tasks add to one number, and
// threads change no bit.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/linear/columns.h"
#include "cpu/microkernel.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace genfast::cpu {
namespace {

constexpr int64_t kRows = 256;     // of a panel of x: 32 KiB at AVX-512
constexpr int64_t kOutputs = 192;  // at most, of a block: its columns of grad take 208 KiB
constexpr int64_t kInputs = 256;   // at most, of a block

// Equal parts of n, multiples of `of`, at most `most` of it.
int64_t part_of(int64_t n, int64_t most, int64_t of) {
  const int64_t parts = (n + most - 1) / most;
  return round_up((n + parts - 1) / parts, of);
}

}  // namespace

namespace GENFAST_ISA {

void linear_weight(const LinearWeightParams& p) {
  const int64_t M = p.x.shape[0], K = p.x.shape[1], N = p.grad.shape[1];
  if (N == 0) return;
  int64_t outputs = part_of(N, kOutputs, MR);
  int64_t inputs = part_of(std::max<int64_t>(K, 1), kInputs, NR);  // K = 0: dbias
  const auto parts = [](int64_t n, int64_t of) { return std::max<int64_t>((n + of - 1) / of, 1); };
  const auto tasks = [&] { return parts(N, outputs) * parts(K, inputs); };
  while (tasks() < 2 * p.threads && inputs > NR) inputs = round_up(inputs / 2, NR);
  while (tasks() < p.threads && outputs > MR) outputs = round_up(outputs / 2, MR);
  const int64_t across = parts(K, inputs);
  const int64_t lda = odd_lines(outputs);
  float* dw = static_cast<float*>(p.dweight.data);
  float* db = static_cast<float*>(p.dbias.data);

  Slots slots(workers(p.threads, tasks()), 4 * kRows * (lda + NR) + 4 * NR * outputs + 8 * outputs);
  parallel_for(tasks(), p.threads, Order::in_order, [&](int64_t task) {
    slots.with([&](char* base) {
      float* grads = reinterpret_cast<float*>(base);  // [row][lda]
      float* panel = grads + kRows * lda;             // [row][NR]
      float* last = panel + kRows * NR;               // [output][NR], of a panel beyond K
      // Of blocks of rows: in fp32 their sum over 10^6 rows was 14 times PyTorch's error.
      double* bias = reinterpret_cast<double*>(last + NR * outputs);
      const int64_t o = task / across * outputs, k0 = task % across * inputs;
      const int64_t n = std::min(outputs, N - o), k1 = std::min(k0 + inputs, K);
      std::fill(bias, bias + n, 0.0);
      for (int64_t first = 0; first < M || first == 0; first += kRows) {
        const int64_t rows = std::min(kRows, M - first);
        const float* grad = static_cast<const float*>(p.grad.data) + first * p.grad.strides[0] + o;
        copy_columns(grad, p.grad.strides[0], rows, n, grads, lda);
        if (k0 == 0 && db != nullptr)
          for (int64_t c = 0; c < n; c += W) {
            f32v sum{};
            for (int64_t r = 0; r < rows; ++r) sum += load(grads + r * lda + c);
            for (int64_t l = 0; l < W && c + l < n; ++l) bias[c + l] += sum[l];
          }
        for (int64_t k = k0; k < k1; k += NR) {
          const int columns = static_cast<int>(std::min<int64_t>(NR, k1 - k));
          const float* x = static_cast<const float*>(p.x.data) + first * p.x.strides[0] + k;
          copy_columns(x, p.x.strides[0], rows, columns, panel, NR);
          const bool whole = columns % W == 0;
          float* to = whole ? dw + o * K + k : last;
          multiply<true>(static_cast<int>(n), columns, rows, grads, lda, panel, NR,
                         store_rows(to, whole ? K : NR, whole && first > 0));
          for (int64_t i = 0; !whole && i < n; ++i)
            for (int c = 0; c < columns; ++c) {
              float& sum = dw[(o + i) * K + k + c];
              sum = first > 0 ? sum + last[i * NR + c] : last[i * NR + c];
            }
        }
      }
      if (k0 == 0 && db != nullptr) std::copy(bias, bias + n, db + o);
    });
  });
}

}  // namespace GENFAST_ISA
}  // namespace genfast::cpu
