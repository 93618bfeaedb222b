// The affine step on the CPU, its log-probability and its gradients. One pass: every source that
// some output needs is read once, in chunks that stay in L1.
#include <cmath>
#include <optional>

#include "cpu/diffusion/chunks.h"

namespace genfast::cpu::GENFAST_ISA {
namespace {

// Groups of elements that share a row of the table, and rows of elements that share everything
// (group, seed, sample): no chunk crosses the border of such a row.
struct Layout {
  int64_t groups, rows, cols, batch;
  const float* table;
  const int64_t* index;
  int64_t row;

  Layout(const TensorView& x, const TensorView& t, const TensorView& i, int64_t r, int64_t least)
      : table(static_cast<const float*>(t.data)),
        index(i.defined() ? static_cast<const int64_t*>(i.data) : nullptr),
        row(r) {
    groups = index != nullptr ? i.numel : 1;
    batch = batch_of(x);
    rows = std::max(groups, least);
    cols = rows > 0 ? x.numel / rows : 0;
  }
  const float* coefficients(int64_t r) const {
    const int64_t at = index == nullptr ? row : index[groups == rows ? r : r * groups / rows];
    return table + at * kRowColumns;
  }
  int64_t sample(int64_t r) const { return rows == batch ? r : r * batch / rows; }
};

const float* output_row(const float* row, int output) {
  return row + kRowCoefficients + output * kSources;
}

// Bit s: source s is used by one of the outputs; x0 brings what it is made of.
unsigned reads_of(const float* row, int outputs) {
  unsigned reads = 0;
  for (int o = 0; o < outputs; ++o)
    for (int s = 0; s < kSources; ++s)
      if (output_row(row, o)[s] != 0.0f) reads |= 1u << s;
  if (reads & 1u << kX0) reads |= (row[0] != 0.0f) << kX | (row[1] != 0.0f) << kM;
  return reads;
}

// A value per sample, or one for all.
float per_sample(const TensorView& t, int64_t b, int64_t width, int64_t at, float otherwise) {
  if (!t.defined()) return otherwise;
  const float* p = static_cast<const float*>(t.data);
  return p[(t.numel > width ? b * width : 0) + at];
}

// m of one chunk: the model output where it lies, or the guided combination in `buffer`.
struct Guided {
  Stage stage[kModels];
  int count = 0;
  const TensorView& weights;

  Guided(const TensorView* models, const TensorView& w)
      : stage{Stage(models[0]), Stage(models[1]), Stage(models[2])}, weights(w) {
    while (count < kModels && models[count].defined()) ++count;
  }
  float weight(int64_t sample, int j) const { return per_sample(weights, sample, count, j, 1.0f); }
  const float* load(int64_t at, int n, int64_t sample, Chunk* buffers) const {
    if (count == 1 && !weights.defined()) return stage[0].load(at, n, buffers[0]);
    combine(at, n, sample, buffers, buffers[kModels].data);
    return buffers[kModels].data;
  }
  void combine(int64_t at, int n, int64_t sample, Chunk* buffers, float* to) const {
    Terms terms;
    for (int j = 0; j < count; ++j) {
      const float w = weight(sample, j);
      if (w != 0.0f) terms.add(stage[j].load(at, n, buffers[j]), w);
    }
    terms.sum(n, to);
  }
};

bool overlaps_a_source(const StepParams& p) {
  const auto begins = [](const TensorView& a, const TensorView& b) {
    return a.defined() && b.defined() && a.data == b.data;
  };
  for (int o = 0; o < kOutputs; ++o) {
    if (begins(p.out[o], p.x) || begins(p.out[o], p.z) || begins(p.out[o], p.known)) return true;
    for (const TensorView& m : p.models)
      if (begins(p.out[o], m)) return true;
    for (const TensorView& h : p.history)
      if (begins(p.out[o], h)) return true;
  }
  return false;
}

template <class T>
const T* flat(const TensorView& t) {
  return t.dtype == kDtype<T> && is_contiguous(t) ? static_cast<const T*>(t.data) : nullptr;
}

// Everything in the order of memory, where no noise and no sum follows the logical one.
bool in_memory_order(StepParams& p) {
  if (p.draws || p.log_prob.defined() ||
      (p.index.defined() && p.index.numel > 1 && p.index.numel != batch_of(p.x)))
    return false;
  MemoryOrder order(p.out[0]);
  for (TensorView* t : {&p.x, &p.z, &p.log_variance, &p.mask, &p.known, &p.known_z, &p.sample})
    order.add(*t);
  for (TensorView& t : p.out) order.add(t);
  for (TensorView& t : p.models) order.add(t);
  for (TensorView& t : p.history) order.add(t);
  return order.apply();
}

// x0 = clamp(d_x x + d_m m), n a multiple of W; a source that is not read is null.
void predict_x0(const float* x, const float* m, const float* row, int n, float* to) {
  const float d_x = row[0], d_m = row[1], clip = row[2];
  for (int i = 0; i < n; i += W) {
    const f32v v = x == nullptr   ? load(m + i) * d_m
                   : m == nullptr ? load(x + i) * d_x
                                  : load(x + i) * d_x + load(m + i) * d_m;
    store(to + i, clamp_symmetric<f32v>(v, splat(clip)));
  }
}

// Memory of the sources of a step, by number; x0 and drawn noise are made block by block.
template <class T>
using Sources = const T* [kSources];

template <class T>
struct FlatOutput {
  T* to;
  int n = 0, source[kSources];
  float c[kSources];

  void add(int s, float coefficient) { source[n] = s, c[n++] = coefficient; }
  void sum(const Sources<T>& sources, const float* weights, int count, T* at) const {
    TermsOf<T> terms;
    for (int k = 0; k < n; ++k) terms.add(sources[source[k]], weights ? weights[k] : c[k]);
    terms.sum(count, at);
  }
};

// O outputs in one walk, each source read once: the first of K sources; of the others the last as
// the first where `full`, the rest of its first two (mostly x and m: history entry, predicted x0).
// On a 64 KiB latent 0.35 us less than one after the other in blocks, of 3.1 for DPM-Solver++ 2M.
template <int K, int O, bool full>
void walk(const Sources<float>& sources, const FlatOutput<float>* out, int64_t at, int n) {
  const float* from[K];
  float c[O][K], *to[O];
#pragma GCC unroll 6
  for (int k = 0; k < K; ++k) from[k] = sources[out[0].source[k]];
#pragma GCC unroll 3
  for (int o = 0; o < O; ++o) {
    to[o] = out[o].to + at;
#pragma GCC unroll 6
    for (int k = 0; k < K; ++k) c[o][k] = k < out[o].n ? out[o].c[k] : 0.0f;
  }
  for (int i = 0; i < n; i += W) {
    f32v v[K], sum[O];
#pragma GCC unroll 6
    for (int k = 0; k < K; ++k) v[k] = load(from[k] + i);
#pragma GCC unroll 3
    for (int o = 0; o < O; ++o) {
      fetch_to_write(to[o] + i);
      sum[o] = v[0] * c[o][0] + v[1] * c[o][1];
#pragma GCC unroll 6
      for (int k = 2; k < K; ++k)
        if (o == 0 || (full && o == O - 1)) sum[o] = sum[o] + v[k] * c[o][k];
    }
#pragma GCC unroll 3
    for (int o = 0; o < O; ++o) store(to[o] + i, sum[o]);
  }
}

using Walk = void (*)(const Sources<float>&, const FlatOutput<float>*, int64_t, int);
constexpr int kWalked = 6;  // sources at most

template <int K>
Walk walk_of(int outputs, bool full) {
  if (outputs == 2) return full ? walk<K, 2, true> : walk<K, 2, false>;
  return full ? walk<K, 3, true> : walk<K, 3, false>;
}

// The walk of these outputs, null where they share less.
Walk shared_walk(const FlatOutput<float>* out, int outputs) {
  const int n = out[0].n;
  if (outputs < 2 || n < 2 || n > kWalked) return nullptr;
  const bool full = out[outputs - 1].n == n;
  for (int o = 1; o < outputs; ++o) {
    if (out[o].n != (full && o == outputs - 1 ? n : 2)) return nullptr;
    for (int k = 0; k < out[o].n; ++k)
      if (out[o].source[k] != out[0].source[k]) return nullptr;
  }
  using Choice = Walk (*)(int, bool);
  static constexpr Choice choices[] = {walk_of<2>, walk_of<3>, walk_of<4>, walk_of<5>, walk_of<6>};
  return choices[n - 2](outputs, full);
}

// The everyday cases without staging: contiguous, one row for all; or guidance alone. On a 64 KiB
// latent the stages cost as much again as the sums themselves. In 16 bits not those that make
// something in fp32 on the way, predicted x0 or noise.
template <class T>
bool flat_step(const StepParams& p) {
  constexpr bool wide = std::is_same_v<T, float>;
  if (p.index.defined() || p.mask.defined() || p.log_prob.defined() || p.threshold.defined() ||
      p.variance != Variance::fixed)
    return false;
  FlatOutput<T> out[kOutputs];
  int outputs = 0;
  for (; outputs < kOutputs && p.out[outputs].defined(); ++outputs)
    if (flat<T>(p.out[outputs]) == nullptr) return false;
  const float* row = static_cast<const float*>(p.table.data) + p.row * kRowColumns;
  const unsigned reads = reads_of(row, outputs);
  const bool guides = p.weights.defined(), predicts = reads & 1u << kX0;
  const bool draws = reads & 1u << kZ && !p.z.defined();
  if ((draws && !p.draws) || (!wide && (draws || predicts))) return false;
  Sources<T> source = {};
  for (int o = 0; o < outputs; ++o) out[o].to = static_cast<T*>(p.out[o].data);
  if (guides) {
    if (reads != 1u << kM || outputs > 1 || output_row(row, 0)[kM] != 1.0f) return false;
    for (int k = 0; k < kModels && p.models[k].defined(); ++k) {
      source[k] = flat<T>(p.models[k]);
      if (source[k] == nullptr) return false;
      out[0].add(k, 0.0f);
    }
  }
  for (int s = 0; s < kSources && !guides; ++s) {
    if (!(reads & 1u << s)) continue;
    if (s != kX0 && !(s == kZ && draws)) {
      source[s] = flat<T>(s == kX   ? p.x
                          : s == kM ? p.models[0]
                          : s == kZ ? p.z
                                    : p.history[s - kH1]);
      if (source[s] == nullptr) return false;
    }
    for (int o = 0; o < outputs; ++o) {
      if (output_row(row, o)[s] == 0.0f) continue;
      for (int k = 0; k < o; ++k)  // in place: nothing is overwritten that is read later
        if (source[s] == out[k].to) return false;
      out[o].add(s, output_row(row, o)[s]);
    }
  }
  if (predicts && !(reads & (1u << kX | 1u << kM))) return false;  // made of nothing
  for (int o = 0; o < outputs; ++o) advise(p.out[o]);

  const NoiseAt noise(p.noise, p.x);
  Walk together = nullptr;
  if constexpr (wide) together = shared_walk(out, outputs);
  const bool own_rows = guides && p.weights.numel > out[0].n;
  int64_t rows = own_rows ? batch_of(p.x) : draws ? noise_rows(p.noise, p.x) : 1;
  int64_t n = rows > 0 ? p.x.numel / rows : 0;
  if (draws && rows > 1 && noise.height(n) > 1) {  // short rows share a block
    n *= noise.height(n);
    rows = (p.x.numel + n - 1) / n;
  }
  const int64_t block = outputs > 1 || predicts || draws ? kChunk : 8 * kChunk;
  const int64_t per_row = (n + block - 1) / block, blocks = rows * per_row;
  const int threads = threads_for(p.x, draws, p.threads);
  const int64_t tasks = threads == 1 ? 1 : std::min<int64_t>(blocks, 8 * std::max(threads, 1));
  parallel_for(tasks, threads, [&](int64_t task) {
    NoiseChunk drawn;
    Chunk x0;
    for (int64_t b = blocks * task / tasks; b < blocks * (task + 1) / tasks; ++b) {
      const int64_t r = b / per_row, first = (b - r * per_row) * block, at = r * n + first;
      const int count = static_cast<int>(std::min({block, n - first, p.x.numel - at}));
      const int whole = count / W * W;
      const float* weights =
          guides ? static_cast<const float*>(p.weights.data) + (own_rows ? r * out[0].n : 0)
                 : nullptr;
      Sources<T> here;
      for (int s = 0; s < kSources; ++s) here[s] = source[s] == nullptr ? nullptr : source[s] + at;
      if constexpr (wide) {
        if (draws) here[kZ] = noise.values<NormalMap>(at, count, drawn);
        if (predicts) {
          predict_x0(here[kX], here[kM], row, whole, x0.data);
          here[kX0] = x0.data;
        }
        if (together != nullptr) together(here, out, at, whole);
      }
      for (int o = 0; o < outputs && together == nullptr && whole > 0; ++o)
        out[o].sum(here, weights, whole, out[o].to + at);
      if (whole == count) continue;
      alignas(64) T last[kSources][W] = {}, sum[W];  // the rest, padded to a vector
      const size_t bytes = (count - whole) * sizeof(T);
      for (int s = 0; s < kSources; ++s) {
        if (here[s] == nullptr || (predicts && s == kX0)) continue;
        __builtin_memcpy(last[s], here[s] + whole, bytes);
        here[s] = last[s];
      }
      if constexpr (wide) {
        if (predicts) {
          predict_x0(here[kX], here[kM], row, W, last[kX0]);
          here[kX0] = last[kX0];
        }
      }
      for (int o = 0; o < outputs; ++o) {
        out[o].sum(here, weights, W, sum);
        __builtin_memcpy(out[o].to + at + whole, sum, bytes);
      }
    }
  });
  return true;
}

bool flat_step(const StepParams& p) {
#if defined(__AVX2__)
  if (p.x.dtype == Dtype::bf16) return flat_step<Bf16>(p);
  if (p.x.dtype == Dtype::f16) return flat_step<Fp16>(p);
#endif
  return flat_step<float>(p);
}

}  // namespace

void diffusion_step(const StepParams& given) {
  std::optional<StepParams> ordered;
  if (!is_contiguous(given.out[0])) {
    ordered = given;
    if (!in_memory_order(*ordered)) ordered.reset();
  }
  const StepParams& p = ordered ? *ordered : given;
  if (flat_step(p)) return;
  const bool judge = p.log_prob.defined(), blend = p.mask.defined();
  const bool dynamic = p.threshold.defined(), learned = p.variance != Variance::fixed;
  int outputs = 0;
  while (outputs < kOutputs && p.out[outputs].defined()) ++outputs;
  const Stage x(p.x), z(p.z), v(p.log_variance), mask(p.mask), known(p.known), known_z(p.known_z);
  const Stage given_sample(p.sample);
  const Stage history[kHistory] = {Stage(p.history[0]), Stage(p.history[1]), Stage(p.history[2]),
                                   Stage(p.history[3]), Stage(p.history[4]), Stage(p.history[5])};
  const Stage out[kOutputs] = {Stage(p.out[0]), Stage(p.out[1]), Stage(p.out[2])};
  for (int o = 0; o < outputs; ++o) advise(p.out[o]);
  const Guided guided(p.models, p.weights);
  const NoiseAt noise(p.noise, p.x);

  const bool per_sample_rows =
      judge || dynamic || p.weights.numel > guided.count || p.level.numel > 2;
  const Layout layout(
      p.x, p.table, p.index, p.row,
      std::max(noise_rows(p.noise, p.x), per_sample_rows ? batch_of(p.x) : int64_t{1}));
  // Outputs may lie on top of sources (in place): with several of them, one must not be stored
  // before the others have read.
  const bool in_place = outputs > 1 && overlaps_a_source(p);
  const int64_t per_row = (layout.cols + kChunk - 1) / kChunk;
  std::unique_ptr<double[]> partial;
  if (judge) partial.reset(new double[layout.rows * per_row + 1]);
  const int threads = threads_for(p.x, p.draws, p.threads);
  const bool guidance_only = outputs == 1 && p.weights.defined() && !judge && !blend;

  for_chunks(layout.rows, layout.cols, threads, [&](int64_t c, int64_t r, int64_t first, int n) {
    const int64_t at = r * layout.cols + first, sample = layout.sample(r);
    const float* row = layout.coefficients(r);
    const unsigned reads = reads_of(row, outputs);
    Chunk xb, mb[kModels + 1], x0b, hb[kHistory], zb, vb, staged[kOutputs], extra[3];
    if (guidance_only && reads == 1u << kM && output_row(row, 0)[kM] == 1.0f) {
      float* to = out[0].target(at, n, staged[0]);
      guided.combine(at, n, sample, mb, to);
      return out[0].store(at, n, to);
    }
    NoiseChunk noise_buffer, known_buffer;
    const float* source[kSources] = {};

    if (reads & 1u << kX) source[kX] = x.load(at, n, xb);
    if (reads & 1u << kM) source[kM] = guided.load(at, n, sample, mb);
    if (reads & 1u << kX0) {
      const bool any = source[kX] != nullptr || source[kM] != nullptr;
      if (any) predict_x0(source[kX], source[kM], row, n, x0b.data);
      const float s = per_sample(p.threshold, sample, 1, 0, 1.0f);
      for (int i = 0; i < n && any && dynamic; i += W)
        store(x0b.data + i, clamp_symmetric<f32v>(load(x0b.data + i), splat(s)) / s);
      source[kX0] = any ? x0b.data : nullptr;
    }
    for (int h = 0; h < kHistory; ++h)
      if (reads & 1u << (kH1 + h) && p.history[h].defined())
        source[kH1 + h] = history[h].load(at, n, hb[h]);
    if (reads & 1u << kZ) {
      if (p.z.defined())
        source[kZ] = z.load(at, n, zb);
      else if (p.draws)
        source[kZ] = noise.values<NormalMap>(at, n, noise_buffer);
      if (learned && source[kZ] != nullptr) {
        const float* from = source[kZ];
        const float* vs = v.load(at, n, vb);
        const f32v low = splat(row[4]), high = splat(row[5]);
        for (int i = 0; i < n; i += W) {
          const f32v vi = load(vs + i);
          const f32v std = p.variance == Variance::learned ? std_learned<f32v>(vi)
                                                           : std_learned_range<f32v>(vi, low, high);
          store(zb.data + i, load(from + i) * std);
        }
        source[kZ] = zb.data;
      }
    }

    float* to[kOutputs];
    for (int o = 0; o < outputs; ++o) {
      const bool first_of_many = o == 0 && (judge || blend);
      to[o] = in_place || first_of_many ? staged[o].data : out[o].target(at, n, staged[o]);
      const float* coefficient = output_row(row, o);
      Terms terms;
      for (int s = 0; s < kSources; ++s)
        if (!(judge && o == 0 && s == kZ)) terms.add(source[s], coefficient[s]);
      terms.sum(n, to[o]);
    }

    if (judge) {  // to[0] is the mean
      const float std = output_row(row, 0)[kZ], inverse = 1.0f / std;
      const float* s;
      if (p.sample.defined()) {
        s = given_sample.load(at, n, extra[0]);
      } else {
        for (int i = 0; i < n; i += W)
          store(extra[0].data + i, load(to[0] + i) + load(source[kZ] + i) * std);
        from_f32(extra[0].data, n, reinterpret_cast<char*>(extra[1].data), p.out[0].dtype);
        to_f32(reinterpret_cast<const char*>(extra[1].data), p.out[0].dtype, n, extra[0].data);
        s = extra[0].data;  // as the caller will see it, so that a replay gives the same number
      }
      for (int i = 0; i < n; i += W) {
        const f32v d = (load(s + i) - load(to[0] + i)) * inverse;
        store(extra[2].data + i, d * d);
      }
      for (int i = n; i < ((n + 7) & ~7); ++i) extra[2].data[i] = 0.0f;
      Eight sum{};
      for (int i = 0; i < n; i += 8) sum += widen(extra[2].data + i);
      partial[c] = -0.5 * total(sum) -
                   n * (std::log(std::fabs(static_cast<double>(std))) + 0.91893853320467274);
      __builtin_memcpy(staged[0].data, s, n * sizeof(float));
    }
    if (blend) {
      const float a = per_sample(p.level, sample, 2, 0, 1.0f);
      const float b = per_sample(p.level, sample, 2, 1, 0.0f);
      const float* k = known.load(at, n, extra[0]);
      const float* e = p.known_z.defined()    ? known_z.load(at, n, extra[1])
                       : b != 0.0f && p.draws ? noise.values<NormalMap>(at, n, known_buffer)
                                              : nullptr;
      const float* w = mask.load(at, n, extra[2]);
      for (int i = 0; i < n; i += W) {
        f32v target = load(k + i) * a;
        if (e != nullptr) target = target + load(e + i) * b;
        const f32v wi = load(w + i);
        store(to[0] + i, load(to[0] + i) * wi + target * (1.0f - wi));
      }
    }
    for (int o = 0; o < outputs; ++o) {
      float* home = out[o].target(at, n, staged[o]);
      if (home != to[o]) __builtin_memcpy(home, to[o], n * sizeof(float));
      out[o].store(at, n, home);
    }
  });

  if (!judge) return;
  float* log_prob = static_cast<float*>(p.log_prob.data);
  const int64_t chunks = layout.batch > 0 ? layout.rows * per_row / layout.batch : 0;
  for (int64_t b = 0; b < layout.batch; ++b) {
    double sum = 0;
    for (int64_t c = b * chunks; c < (b + 1) * chunks; ++c) sum += partial[c];
    log_prob[b] = static_cast<float>(sum);
  }
}

void diffusion_step_backward(const StepBackwardParams& p) {
  const Stage grad[kOutputs] = {Stage(p.grad[0]), Stage(p.grad[1]), Stage(p.grad[2])};
  const Stage x(p.x), mask(p.mask), d_x(p.d_x), d_z(p.d_z);
  const Stage d_models[kModels] = {Stage(p.d_models[0]), Stage(p.d_models[1]),
                                   Stage(p.d_models[2])};
  const Stage d_history[kHistory] = {Stage(p.d_history[0]), Stage(p.d_history[1]),
                                     Stage(p.d_history[2]), Stage(p.d_history[3]),
                                     Stage(p.d_history[4]), Stage(p.d_history[5])};
  const Guided guided(p.models, p.weights);
  const bool dynamic = p.threshold.defined();
  const bool per_sample_rows = dynamic || p.weights.numel > guided.count;
  const Layout layout(p.x, p.table, p.index, p.row, per_sample_rows ? batch_of(p.x) : 1);
  bool want_m = false;
  for (const TensorView& t : p.d_models) want_m |= t.defined();
  advise(p.d_x);
  for (const TensorView& t : p.d_models) advise(t);
  const int threads = threads_for(p.x, false, p.threads);

  for_chunks(layout.rows, layout.cols, threads, [&](int64_t, int64_t r, int64_t first, int n) {
    const int64_t at = r * layout.cols + first, sample = layout.sample(r);
    const float* row = layout.coefficients(r);
    Chunk gb[kOutputs], xb, mb[kModels + 1], x0b, gmb, staged;
    const float* g[kOutputs] = {};
    for (int o = 0; o < kOutputs; ++o)
      if (p.grad[o].defined()) g[o] = grad[o].load(at, n, gb[o]);
    if (p.mask.defined() && g[0] != nullptr) {  // of the blend: only the generated part counts
      const float* w = mask.load(at, n, xb);
      for (int i = 0; i < n; i += W) store(gb[0].data + i, load(g[0] + i) * load(w + i));
      g[0] = gb[0].data;
    }
    const auto into = [&](int source) {
      Terms terms;
      for (int o = 0; o < kOutputs; ++o) terms.add(g[o], output_row(row, o)[source]);
      return terms;
    };
    const auto write = [&](const Terms& terms, const Stage& stage) {
      float* to = stage.target(at, n, staged);
      terms.sum(n, to);
      stage.store(at, n, to);
    };

    const float* g0 = nullptr;  // gradient of the unclamped x0
    Terms of_x0 = into(kX0);
    if (of_x0.n > 0 && (p.d_x.defined() || want_m)) {
      of_x0.sum(n, x0b.data);
      g0 = x0b.data;
      const float s = per_sample(p.threshold, sample, 1, 0, 1.0f);
      const float bound = dynamic ? std::min(s, row[2]) : row[2];
      if (bound < INFINITY) {
        const float* xs = x.load(at, n, xb);
        const float* ms = guided.load(at, n, sample, mb);
        for (int i = 0; i < n; i += W) {
          const f32v raw = load(xs + i) * row[0] + load(ms + i) * row[1];
          const f32v size = select(raw < 0.0f, -raw, raw);
          const f32v kept = select(size > bound, f32v{}, load(g0 + i));
          store(x0b.data + i, dynamic ? kept / s : kept);
        }
      }
    }
    if (p.d_x.defined()) {
      Terms terms = into(kX);
      terms.add(g0, row[0]);
      write(terms, d_x);
    }
    if (want_m) {
      Terms terms = into(kM);
      terms.add(g0, row[1]);
      terms.sum(n, gmb.data);
      for (int j = 0; j < guided.count; ++j) {
        if (!p.d_models[j].defined()) continue;
        Terms scaled;
        scaled.add(gmb.data, guided.weight(sample, j));
        write(scaled, d_models[j]);
      }
    }
    for (int h = 0; h < kHistory; ++h)
      if (p.d_history[h].defined()) write(into(kH1 + h), d_history[h]);
    if (p.d_z.defined()) write(into(kZ), d_z);
  });
}

}  // namespace genfast::cpu::GENFAST_ISA
