// Fused attention on CPU; compiled once per ISA level. A call is in call.h, its steps in forward.h
// and backward.h, the products in microkernel.h, matrix.h and decode.h.
#include "cpu/attention/append.h"
#include "cpu/attention/call.h"
#include "cpu/kernels.h"

namespace genfast::cpu {
namespace {

void append(const AttentionAppendParams& a) {
  const Append work{a};
  const int64_t q_tasks = a.cos != nullptr && a.q.data != nullptr ? a.B * a.Hq : 0;
  const int64_t k_tasks = a.k_new.data != nullptr ? a.B * a.Hkv : 0;
  const int64_t elements = q_tasks * a.Sq * a.D + k_tasks * a.S_new * (a.D + a.Dv);
  parallel_for(q_tasks + k_tasks, elements < 32768 ? 1 : a.threads, [&](int64_t t) {
    if (t < q_tasks)
      work.rotate_queries(t / a.Hq, t % a.Hq);
    else
      work.append_keys((t - q_tasks) / a.Hkv, (t - q_tasks) % a.Hkv);
  });
}

}  // namespace

namespace GENFAST_ISA {
void attention_append(const AttentionAppendParams& a) { append(a); }
void attention_backward(const AttentionGradParams& g) { backward<VectorUnit>(g); }
void attention_forward(const AttentionParams& p) { forward<VectorUnit>(p); }
}  // namespace GENFAST_ISA
}  // namespace genfast::cpu
