// One call of forward or backward by one unit: scratch, tasks, threads.
#pragma once
#include "cpu/attention/backward.h"
#include "cpu/attention/columns.h"
#include "cpu/attention/forward.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace genfast::cpu {
namespace {

// Scores by columns. A short call is one run of heads for each thread, and the same thread for the
// same heads: what it wrote forward lies in its own cache backward.
template <class Work>
void run_columns(const Work& work, double flops, int threads) {
  const int64_t tasks = work.tasks(), shares = workers(flops < 4e5 ? 1 : threads, tasks);
  int64_t bundles = static_cast<int64_t>(flops / 5e6);
  bundles = bundles < shares ? shares : bundles < tasks ? bundles : tasks;
  Arena sizes;
  work.lay_out(sizes);
  Slots slots(static_cast<int>(shares), sizes.used);
  parallel_for(bundles, static_cast<int>(shares), [&](int64_t bundle) {
    slots.with([&](char* base) {
      Arena arena{base, 0};
      const auto x = work.lay_out(arena);
      const int64_t end = (bundle + 1) * tasks / bundles;
      for (int64_t t = bundle * tasks / bundles; t < end; ++t) work.run_task(t, x);
    });
  });
}

template <class Unit>
void forward(const AttentionParams& p) {
  Forward<Unit> f(p);
  if (p.B == 0 || p.Hq == 0 || f.longest_q == 0) return;
  if constexpr (!Unit::matrix) {
    const ColumnForward work(p, f.longest_q, f.longest_k);
    if (!f.in_place && (f.splits == 1 || work.enough()) && work.fits())
      return run_columns(work, 2.0 * (p.D + p.Dv) * p.B * p.Hq * f.longest_q * f.longest_k,
                         p.threads);
  }
  const int64_t tasks = p.B * p.Hkv * f.groups * f.splits;
  // A short task costs less than handing it out: bundle up to about 50 us of products.
  const double flops = 2.0 * (p.D + p.Dv) * f.longest_k * f.longest_q * (p.Hq / p.Hkv) /
                       static_cast<double>(f.groups * f.splits);
  int64_t grain = 1;
  while (grain < 64 && flops * grain < 2e6 &&
         grain * 2 * 4 * (p.threads > 0 ? p.threads : 8) <= tasks)
    grain *= 2;
  // A second thread costs 2 us; products run at 100 flops/ns, decoding at 30.
  const int threads = flops * tasks < (f.in_place ? 1.5e5 : 4e5) ? 1 : p.threads;
  const int64_t bundles = (tasks + grain - 1) / grain;

  Arena sizes;
  f.lay_out(sizes);
  Slots slots(workers(threads, bundles), sizes.used);
  const int64_t rows = p.B * p.Hq * f.longest_q;
  Arena parts;
  const auto take_parts = [&] {
    f.part_o = parts.take<float>(rows * f.splits * f.ldo);
    f.part_m = parts.take<float>(rows * f.splits);
    f.part_l = parts.take<float>(rows * f.splits);
  };
  if (f.splits > 1) take_parts();
  Memory memory(parts.used);
  if (f.splits > 1) {
    parts = {memory.data(), 0};
    take_parts();
  }
  parallel_for(bundles, threads, Order::in_order, [&](int64_t bundle) {
    slots.with([&](char* base) {
      Arena arena{base, 0};
      const ForwardScratch<Unit> x = f.lay_out(arena);
      [[maybe_unused]] const typename Unit::Turn turn;
      const int64_t end = (bundle + 1) * grain < tasks ? (bundle + 1) * grain : tasks;
      for (int64_t t = bundle * grain; t < end; ++t) f.run_task(t, x);
    });
  });
  if (f.splits > 1)
    parallel_for(p.B * p.Hq, threads, [&](int64_t bh) {
      for (int64_t i = 0; i < f.longest_q; ++i) f.merge_row(bh / p.Hq, bh % p.Hq, i);
    });
}

// Runs body(scratch, task) for all tasks, each thread with its own scratch. No more threads than
// slots: one that waits for an earlier task (add_to_total) keeps its slot.
template <class Unit, class Body>
void run_with_scratch(const Backward<Unit>& f, bool for_mask, int64_t tasks, int threads,
                      Body&& body) {
  Arena sizes;
  f.lay_out(sizes, for_mask);
  Slots slots(workers(threads, tasks), sizes.used);
  parallel_for(tasks, slots.count(), Order::in_order, [&](int64_t task) {
    slots.with([&](char* base) {
      Arena arena{base, 0};
      [[maybe_unused]] const typename Unit::Turn turn;
      body(f.lay_out(arena, for_mask), task);
    });
  });
}

// An empty batch has gradients too: those of mask, sinks and cache are zeros, and written.
template <class Unit>
void backward(const AttentionGradParams& g) {
  const AttentionParams& p = g.p;
  Backward<Unit> f(g);
  const double flops = 2.0 * p.B * p.Hq * f.longest_q * f.longest_k * (3.0 * p.D + 2.0 * p.Dv);
  if constexpr (!Unit::matrix)
    if (const ColumnBackward work(g, f.longest_q, f.longest_k); f.splits == 1 && work.fits())
      return run_columns(work, flops, p.threads);
  const int threads = flops < 4e5 ? 1 : p.threads;
  Arena sizes;
  const auto take = [&](Arena& a) {
    f.lse2 = a.take<float>(p.Hq * f.stat_rows());
    f.delta = a.take<float>(p.Hq * f.stat_rows());
    if (f.splits > 1) f.total_dq = a.take<float>(f.heads() * f.group_rows() * f.ldk);
  };
  take(sizes);
  Memory memory(sizes.used);
  Arena arena{memory.data(), 0};
  take(arena);
  if (f.splits > 1) f.turns.reset(new std::atomic<int64_t>[f.heads()]());
  parallel_for(p.B * p.Hq, threads, [&](int64_t bh) { f.prepare_rows(bh / p.Hq, bh % p.Hq); });
  run_with_scratch(f, false, f.heads() * f.splits, threads,
                   [&](const BackwardScratch<Unit>& x, int64_t task) { f.run_task(task, x); });
  if (g.dsinks != nullptr)
    parallel_for(p.Hq, threads, [&](int64_t head) { f.sink_gradient(head); });
  if constexpr (!Unit::matrix)
    if (g.dmask.data != nullptr)
      run_with_scratch(f, true, f.mask_batches() * f.mask_heads() * f.mask_blocks(), threads,
                       [&](const BackwardScratch<Unit>& x, int64_t task) { f.mask_task(task, x); });
}

}  // namespace
}  // namespace genfast::cpu
