// Reductions of the diffusion family on the CPU: guidance weights from five sums per sample, and
// the exact quantile of |x0| by selection.
#include <cmath>

#include "cpu/diffusion/chunks.h"

namespace genfast::cpu::GENFAST_ISA {

void guidance_weights(const GuidanceParams& p) {
  const bool average = p.average.defined();
  const Stage cond(p.cond), other(average ? p.average : p.uncond);
  const int64_t batch = batch_of(p.cond), cols = batch > 0 ? p.cond.numel / batch : 0;
  const int64_t per_row = (cols + kChunk - 1) / kChunk;
  std::unique_ptr<GuidanceSums[]> partial;
  if (p.method != Guidance::cfg) {
    partial.reset(new GuidanceSums[batch * per_row + 1]);
    const int threads = threads_for(p.cond, false, p.threads);
    for_chunks(batch, cols, threads, [&](int64_t chunk, int64_t b, int64_t first, int n) {
      Chunk cb, ub;
      const int64_t at = b * cols + first;
      const float* c = cond.load(at, n, cb);
      const float* u = other.load(at, n, ub);
      Eight sc{}, su{}, cc{}, uu{}, cu{};
      for (int i = 0; i < n; i += 8) {  // a partial chunk is padded with zeros
        const Eight ci = widen(c + i), ui = widen(u + i);
        sc += ci;
        su += ui;
        cc += ci * ci;  // products of two floats are exact in double
        uu += ui * ui;
        cu += ci * ui;
      }
      GuidanceSums& s = partial[chunk];
      s.c = total(sc), s.u = total(su), s.cc = total(cc), s.uu = total(uu), s.cu = total(cu);
    });
  }
  const float* scale = static_cast<const float*>(p.scale.data);
  float* weights = static_cast<float*>(p.weights.data);
  const int width = average ? 3 : 2;
  for (int64_t b = 0; b < batch; ++b) {
    GuidanceSums s;
    for (int64_t c = b * per_row; partial && c < (b + 1) * per_row; ++c) {
      s.c += partial[c].c;
      s.u += partial[c].u;
      s.cc += partial[c].cc;
      s.uu += partial[c].uu;
      s.cu += partial[c].cu;
    }
    double w[3];
    genfast::guidance_weights(p.method, s, static_cast<double>(cols),
                              scale[p.scale.numel > 1 ? b : 0], p.original, p.option, average, w);
    for (int j = 0; j < width; ++j) weights[b * width + j] = static_cast<float>(w[j]);
  }
}

// Magnitudes order as their bits do: a histogram of the upper bits finds the bin of the wanted
// rank, a second pass collects that bin (and the next, for the interpolation). Of short samples,
// side by side, everything is collected at once: the histogram's bins alone take 2 us.
void dynamic_threshold(const ThresholdParams& p) {
  const Stage x(p.x), m(p.m);
  const bool convert = p.m.defined();
  const int64_t batch = batch_of(p.x), n = batch > 0 ? p.x.numel / batch : 0;
  if (n == 0) return;
  constexpr int kBins = 1 << 12, kShift = 19;  // sign is 0; a bin is an eighth of an octave
  constexpr int kInfinite = 0xFF0;             // bins from here on hold inf and NaN
  constexpr int64_t kSplits = 8;
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  const int64_t splits = std::min(kSplits, std::max<int64_t>(1, chunks / 16));
  const int64_t* index = p.index.defined() ? static_cast<const int64_t*>(p.index.data) : nullptr;
  float* result = static_cast<float*>(p.s.data);

  // Of all samples, or of one; none without a conversion.
  const bool own_rows = convert && index != nullptr && p.index.numel > 1;
  const auto row_of = [&](int64_t b) -> const float* {
    if (!convert) return nullptr;
    const int64_t row = index == nullptr ? p.row : index[own_rows ? b : 0];
    return static_cast<const float*>(p.table.data) + row * kRowColumns;
  };
  const auto magnitudes = [&](int64_t first, int count, const float* row, float* to) {
    Chunk xb, mb;
    const float* xs = x.load(first, count, xb);
    const float* ms = convert ? m.load(first, count, mb) : xs;
    for (int i = 0; i < count; i += W) {
      f32v v = load(xs + i);
      if (convert) v = v * row[0] + load(ms + i) * row[1];
      store(to + i, from_bits(bits(v) & 0x7FFFFFFFu));
    }
  };
  const auto over = [&](int64_t b, int64_t split, auto&& fn) {
    const float* row = row_of(b);
    for (int64_t c = chunks * split / splits; c < chunks * (split + 1) / splits; ++c) {
      const int64_t first = c * kChunk;
      const int count = static_cast<int>(std::min<int64_t>(kChunk, n - first));
      Chunk ab;
      magnitudes(b * n + first, count, row, ab.data);
      fn(ab.data, count);
    }
  };

  const double rank = p.ratio * static_cast<double>(n - 1);
  const int64_t low = static_cast<int64_t>(rank), high = std::min(low + 1, n - 1);
  // The bound of a sample from `count` magnitudes around the wanted ones, `before` smaller ones
  // aside.
  const auto bound = [&](float* all, int64_t count, int64_t before) -> float {
    for (int64_t i = 0; i < count; ++i)
      if (all[i] != all[i]) return NAN;
    float* at = all + (low - before);
    std::nth_element(all, at, all + count, [](float a, float c) { return a < c; });
    const double lower = *at;
    double upper = lower;
    if (high > low) {
      upper = INFINITY;
      for (const float* f = at + 1; f < all + count; ++f)
        if (*f < upper) upper = *f;
    }
    const double weight = rank - static_cast<double>(low);  // inf - inf is avoided
    const double q = upper == lower || weight == 0 ? lower : lower + weight * (upper - lower);
    return static_cast<float>(std::min(std::max(q, 1.0), p.max));
  };
  const int64_t together = own_rows ? 1 : std::max<int64_t>(1, kChunk / n);
  const auto whole = [&](int64_t b, int64_t end) {
    for (Chunk all; b < end; b += together) {
      const int64_t here = std::min(together, end - b);
      magnitudes(b * n, static_cast<int>(here * n), row_of(b), all.data);
      for (int64_t k = 0; k < here; ++k) result[b + k] = bound(all.data + k * n, n, 0);
    }
  };
  const auto by_bins = [&](int64_t b) {
    const std::unique_ptr<uint32_t[]> counts(new uint32_t[splits * kBins]);
    parallel_for(splits, p.threads, [&](int64_t split) {
      uint32_t* histogram = counts.get() + split * kBins;
      __builtin_memset(histogram, 0, kBins * sizeof(uint32_t));
      over(b, split, [&](const float* a, int count) {
        for (int i = 0; i < count; ++i) ++histogram[bits(a[i]) >> kShift];
      });
    });
    int64_t below = 0, before = 0;  // elements under the bin of `low`
    int bin = -1, last = -1;
    for (int k = 0; k < kBins; ++k) {
      int64_t here = 0;
      for (int64_t s = 0; s < splits; ++s) here += counts[s * kBins + k];
      if (bin < 0 && below + here > low) bin = k, before = below;
      if (last < 0 && below + here > high) last = k;
      below += here;
    }
    // Everything in the bins of `low` and `high` (none lies between them), and what may be NaN.
    const auto wanted = [&](int k) { return k == bin || k == last || k >= kInfinite; };
    int64_t begin[kSplits + 1] = {};
    for (int64_t s = 0; s < splits; ++s) {
      begin[s + 1] = begin[s] + counts[s * kBins + bin];
      if (last != bin) begin[s + 1] += counts[s * kBins + last];
      for (int k = kInfinite; k < kBins; ++k)
        if (k != bin && k != last) begin[s + 1] += counts[s * kBins + k];
    }
    const int64_t count = begin[splits];
    const std::unique_ptr<float[]> all(new float[count]);
    parallel_for(splits, p.threads, [&](int64_t split) {
      float* to = all.get() + begin[split];
      over(b, split, [&](const float* a, int length) {
        for (int i = 0; i < length; ++i)
          if (wanted(static_cast<int>(bits(a[i]) >> kShift))) *to++ = a[i];
      });
    });
    result[b] = bound(all.get(), count, before);
  };
  // Samples side by side, where one alone has no work for several threads.
  const int64_t per_task = std::max<int64_t>(1, 4 * kChunk / n);
  const int threads = splits > 1 ? 1 : threads_for(p.x, true, p.threads);
  parallel_for((batch + per_task - 1) / per_task, threads, [&](int64_t task) {
    const int64_t first = task * per_task, end = std::min(batch, first + per_task);
    if (n <= kChunk) return whole(first, end);
    for (int64_t b = first; b < end; ++b) by_bins(b);
  });
}

}  // namespace genfast::cpu::GENFAST_ISA
