// Bias, noise and activation on CUDA, and its backward: the CPU's operations in the CPU's order.
//
// Memory is [outer][channels][inner]; with channels inside, every place is an outer and inner is 1.
// A block takes a box of it: `g` outers, `k` channels, `n` places of a row. The bias of its
// channels and the noise of its places go to shared memory first, so a normal is drawn once for 8
// channels of long rows and once for all those of a box otherwise: it takes about 90 instructions,
// and an H100 issues 70 while an fp32 element comes and goes. Then threads take groups of eight
// side by side, on 16 bytes wherever the rows end.
//
// The activation is a uniform branch: a kernel for each was 1 MB of code instead of a quarter, and
// took nvcc four times as long.
#include "api/filtering.h"
#include "cuda/noise.cuh"
#include "cuda/team.cuh"
#include "math/filtering.h"

namespace genfast::cuda {
namespace {

constexpr int kBlock = 128;
constexpr int kBox = 4096;       // elements: four groups a thread
constexpr int kSmallBox = 1024;  // of tensors below kSmall, so that these too are many blocks
constexpr int64_t kSmall = 1 << 21;
constexpr int kPlaces = 1024, kBiases = 512;  // of a box at most
constexpr int64_t kParts = 640;  // blocks that share the sums: five on each of 128 multiprocessors

// Floats in shared memory, element i % 8 of eight in a line of its own: neither neighbouring groups
// (one element of each at a time) nor neighbouring elements fall into one bank.
template <int kRoom>
struct Strip {
  static constexpr int kLine = kRoom / kGroup + 4;
  float memory[kGroup * kLine];
  __device__ __forceinline__ float& operator[](int i) { return memory[(i & 7) * kLine + (i >> 3)]; }
};
struct Shared {
  Strip<kBiases> bias;   // of the box's channels
  Strip<kPlaces> noise;  // of its places [g][n]
};

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t at_least_one(int64_t a) { return a < 1 ? 1 : a; }
int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t in_eights(int64_t i) { return i < kGroup ? i : i / kGroup * kGroup; }  // stays on 16 bytes

struct Box {
  int64_t o, c, i;  // where it begins
  int g, k, n;
};

// Cut by the shape alone, so that sums do not depend on the GPU.
struct Boxes {
  int64_t outer, channels, inner;
  int64_t across, chunks, count;  // boxes: of a row, of the channels, of the places
  int g, k, n;

  Boxes(const Planes& p, bool noise, bool sums)
      : outer(p.channels_inner ? p.outer * p.inner : p.outer),
        channels(p.channels),
        inner(p.channels_inner ? 1 : p.inner) {
    const int64_t room = outer * channels * inner < kSmall ? kSmallBox : kBox;
    // Long rows are cut where channels share noise, else left whole: fewer edges off 16 bytes.
    const int64_t sharing = noise ? least(at_least_one(channels), 8) : 1;
    const int64_t most_places = noise ? kPlaces : room;
    const int64_t places =
        at_least_one(least(inner, least(most_places, in_eights(room / sharing))));
    // A channel's sum is made by at least one thread of its own.
    const int64_t most = in_eights(least(room / places, sums ? kBlock : kBiases));
    const int64_t even = ceiling(channels, at_least_one(ceiling(channels, most)));
    const int64_t width = at_least_one(least(channels, least(most, ceiling(even, 8) * 8)));
    int64_t outers = 1;
    if (places >= inner) outers = in_eights(least(room / (width * places), most_places / places));
    g = static_cast<int>(outers), k = static_cast<int>(width), n = static_cast<int>(places);
    across = ceiling(inner, places), chunks = ceiling(channels, width);
    count = ceiling(outer, outers) * across;
  }

  __device__ __forceinline__ int channels_of(int64_t chunk) const {
    const int64_t left = channels - chunk * k;
    return left < k ? static_cast<int>(left) : k;
  }
  __device__ __forceinline__ Box box(int64_t index, int64_t chunk) const {
    const int64_t row = across == 1 ? index : index / across;
    Box b{row * g, chunk * k, (index - row * across) * n, g, channels_of(chunk), n};
    if (outer - b.o < g) b.g = static_cast<int>(outer - b.o);
    if (inner - b.i < n) b.n = static_cast<int>(inner - b.i);
    return b;
  }

  // fn(index, low, high, e) for this thread's groups: elements [index + low, index + high) of the
  // memory, of which e + low is the first in the order [g][k][n] of the box. A box is one run of
  // memory, or a run for each outer or channel; groups lie on multiples of eight in the memory.
  template <class Fn>
  __device__ __forceinline__ void for_groups(const Box& b, Fn&& fn) const {
    const bool rows = b.n == inner, all = rows && b.k == channels;
    const int runs = all ? 1 : rows ? b.g : b.k;
    const int length = all ? b.g * b.k * b.n : rows ? b.k * b.n : b.n;
    const int64_t step = rows ? channels * inner : inner;
    const int64_t start = (b.o * channels + b.c) * inner + b.i;
    const bool aligned = ((runs == 1 ? start : start | step) & 7) == 0;
    const int per_run = (length + (aligned ? 7 : 14)) / kGroup;
#pragma unroll 1
    for (int t = static_cast<int>(threadIdx.x); t < runs * per_run; t += kBlock) {
      const int run = t / per_run;
      const int64_t first = start + run * step;
      const int at = (t - run * per_run) * kGroup - static_cast<int>(first & 7);  // in the run
      const int low = at < 0 ? -at : 0, high = length - at < kGroup ? length - at : kGroup;
      if (low < high) fn(first + at, low, high, run * length + at);
    }
  }
};

// What is added to x.
struct Added {
  Stage bias, noise;
  Noise drawn;
  const float* strength;
  int64_t period = 1;    // of given noise along the places
  int64_t per_seed = 1;  // places
  bool has_bias, has_noise, draws;

  Added(const BiasActParams& p, bool with_bias, bool with_noise)
      : bias(p.b),
        noise(p.noise),
        drawn(p.drawn),
        strength(static_cast<const float*>(p.strength.data)),
        has_bias(with_bias && p.b.defined()),
        has_noise(with_noise && (p.draws || p.noise.defined())),
        draws(p.draws) {
    const int64_t places = p.planes.outer * p.planes.inner;
    if (p.noise.numel > 0) period = p.noise.numel;
    per_seed = places / (p.drawn.n_seeds > 1 ? p.drawn_rows : 1);
  }
  __device__ __forceinline__ bool any() const { return has_bias || has_noise; }

  __device__ __forceinline__ void fill(const Boxes& boxes, const Box& b, Shared& shared) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (has_bias) {
#pragma unroll 1
      for (int i = thread; i < b.k; i += kBlock) shared.bias[i] = load_one(bias, b.c + i);
    }
    if (!has_noise) return;
    const int64_t first = b.o * boxes.inner + b.i;  // the places of a box follow each other
    if (draws) return draw(first, first + b.g * b.n, shared);
#pragma unroll 1
    for (int i = thread; i < b.g * b.n; i += kBlock)
      shared.noise[i] = load_one(noise, (first + i) % period);
  }

  // A thread draws a Philox block, four normals, of the places [begin, end) of a seed.
  __device__ __forceinline__ void draw(int64_t begin, int64_t end, Shared& shared) const {
    const int64_t row0 = begin / per_seed;
    const int rows = static_cast<int>((end - 1) / per_seed - row0) + 1;
    const int most = static_cast<int>(per_seed < end - begin ? per_seed : end - begin);
    const int blocks = (most + 6) / 4;  // of a seed, wherever in a block its first place is
#pragma unroll 1
    for (int t = static_cast<int>(threadIdx.x); t < rows * blocks; t += kBlock) {
      const int row = t / blocks, block = t - row * blocks;
      const int64_t origin = (row0 + row) * per_seed;
      const int64_t from = origin > begin ? origin : begin;
      const int64_t to = origin + per_seed < end ? origin + per_seed : end;
      const int64_t element = drawn.offset + (from - origin);
      const int64_t at = from + block * 4 - (element & 3);
      if (at >= to) continue;
      float v[4];
      NormalMap::map(philox(seed_of_row(drawn, row0 + row), drawn.stream,
                            static_cast<uint64_t>(element >> 2) + block),
                     v);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (at + i >= from && at + i < to) shared.noise[static_cast<int>(at + i - begin)] = v[i];
    }
  }

  // Bias and noise of a group.
  __device__ __forceinline__ void of_group(const Box& b, Shared& shared, int e, int low, int high,
                                           float (&of_bias)[kGroup],
                                           float (&of_noise)[kGroup]) const {
    const int row = (e + low) / b.n, outer = row / b.k;
    int column = e + low - row * b.n, channel = row - outer * b.k;
    int place = outer * b.n + column;
    if ((e | b.n) % kGroup == 0) {  // one channel
      const float one = has_bias ? shared.bias[channel] : 0.0f;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        of_bias[i] = one;
        if (has_noise) of_noise[i] = shared.noise.memory[i * shared.noise.kLine + place / kGroup];
      }
    } else if (b.n == 1 && (e | b.k) % kGroup == 0) {  // one place
      const float one = has_noise ? shared.noise[place] : 0.0f;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        of_noise[i] = one;
        if (has_bias) of_bias[i] = shared.bias.memory[i * shared.bias.kLine + channel / kGroup];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i < low || i >= high) continue;
        if (has_bias) of_bias[i] = shared.bias[channel];
        if (has_noise) of_noise[i] = shared.noise[place];
        ++place;
        if (++column < b.n) continue;
        column = 0;
        if (++channel < b.k)
          place -= b.n;
        else
          channel = 0;
      }
    }
  }

  // z = (x + strength n) + b.
  __device__ __forceinline__ void add(const float (&of_bias)[kGroup],
                                      const float (&of_noise)[kGroup], float (&z)[kGroup]) const {
    if (has_noise) {
      const float s = *strength;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) z[i] = z[i] + s * of_noise[i];
    }
    if (has_bias) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) z[i] = z[i] + of_bias[i];
    }
  }
};

struct Forward {
  Boxes boxes;
  Added added;
  Stage x, y;
  Activation act;
  float alpha, gain, clamp;
};

__global__ void __launch_bounds__(kBlock, 8) act_forward(const __grid_constant__ Forward p) {
  GENFAST_SHARED(Shared, shared);
  for (int64_t t = blockIdx.x; t < p.boxes.count * p.boxes.chunks; t += gridDim.x) {
    const int64_t index = p.boxes.chunks == 1 ? t : t / p.boxes.chunks;
    const Box box = p.boxes.box(index, t - index * p.boxes.chunks);
    if (p.added.any()) {
      p.added.fill(p.boxes, box, shared);
      __syncthreads();
    }
    p.boxes.for_groups(box, [&](int64_t at, int low, int high, int e) {
      float z[kGroup];
      load(p.x, at, low, high, z);
      if (p.added.any()) {
        float bias[kGroup] = {}, noise[kGroup] = {};
        p.added.of_group(box, shared, e, low, high, bias, noise);
        p.added.add(bias, noise, z);
      }
      with_activation(p.act, [&](auto act) {
        using Act = decltype(act);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) z[i] = Act::value(z[i], p.alpha) * p.gain;
      });
      if (p.clamp >= 0.0f) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) z[i] = clamp_symmetric<float>(z[i], p.clamp);
      }
      store(p.y, at, low, high, z);
    });
    if (p.added.any()) __syncthreads();  // read, before the next box comes
  }
}

struct Backward {
  Boxes boxes;
  Added added;
  Stage source, grad, dz;
  float *db, *d_strength;
  double* partial;  // [parts][channels], then of strength [parts][chunks]; null: a block has it all
  int64_t parts;
  Activation act;
  float alpha, gain, clamp;
  bool from_y;
};

// This thread's share of a channel's sum over the box: up to 64 terms, in fp32 as on the CPU.
__device__ __forceinline__ float sum_of_channel(const Box& b, Strip<kBox>& made, int channel,
                                                int lane, int lanes) {
  const bool along_rows = b.n >= b.g;  // the longer is shared by the threads of a channel
  float sum = 0.0f;
  for (int o = along_rows ? 0 : lane; o < b.g; o += along_rows ? 1 : lanes)
    for (int i = along_rows ? lane : 0; i < b.n; i += along_rows ? lanes : 1)
      sum += made[(o * b.k + channel) * b.n + i];
  return sum;
}

// A block takes every `parts`-th box of some channels, one chunk of them after another. Five blocks
// leave 96 registers, six 80, which spill on sm_80.
__global__ void __launch_bounds__(kBlock, 5) act_backward(const __grid_constant__ Backward p) {
  GENFAST_SHARED(Shared, shared);
  GENFAST_SHARED(double[kBlock], of_thread);
  GENFAST_DYNAMIC_SHARED(memory);  // dz of the box in fp32, where sums are wanted
  auto* made = reinterpret_cast<Strip<kBox>*>(memory);
  const bool sums = p.db != nullptr, strength = p.d_strength != nullptr;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t at_once = gridDim.x / p.parts, part = blockIdx.x / at_once;
  const int64_t first_chunk = blockIdx.x - part * at_once;
  double of_strength = 0;

  for (int64_t chunk = first_chunk; chunk < p.boxes.chunks; chunk += at_once) {
    // Threads that make the sum of one channel; without sums a chunk may have more channels.
    const int channels = p.boxes.channels_of(chunk), lanes = sums ? kBlock / channels : 1;
    const int channel = thread / lanes, lane = thread - channel * lanes;
    double of_channel = 0;
    for (int64_t index = part; index < p.boxes.count; index += p.parts) {
      const Box box = p.boxes.box(index, chunk);
      if (p.added.any()) {
        p.added.fill(p.boxes, box, shared);
        __syncthreads();
      }
      p.boxes.for_groups(box, [&](int64_t at, int low, int high, int e) {
        float z[kGroup], d[kGroup], bias[kGroup] = {}, noise[kGroup] = {};
        load(p.source, at, low, high, z);
        load(p.grad, at, low, high, d);
        if (p.added.any()) {
          p.added.of_group(box, shared, e, low, high, bias, noise);
          if (!p.from_y) p.added.add(bias, noise, z);
        }
        with_activation(p.act, [&](auto act) {
          using Act = decltype(act);
#pragma unroll
          for (int i = 0; i < kGroup; ++i) d[i] = d[i] * (Act::slope(z[i], p.alpha) * p.gain);
          if (p.clamp < 0.0f) return;
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            const float y = p.from_y ? z[i] : Act::value(z[i], p.alpha) * p.gain;
            d[i] = (y < 0.0f ? -y : y) < p.clamp ? d[i] : 0.0f;
          }
        });
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (i < low || i >= high) continue;
          dot += d[i] * noise[i];
          if (sums) (*made)[e + i] = d[i];
        }
        of_strength += dot;
        store(p.dz, at, low, high, d);
      });
      if (!p.added.any() && !sums) continue;
      __syncthreads();
      if (!sums) continue;
      if (channel < channels) of_channel += sum_of_channel(box, *made, channel, lane, lanes);
      __syncthreads();
    }
    if (!sums) continue;
    of_thread[thread] = of_channel;
    __syncthreads();
    if (thread < channels) {
      double total = 0;
      for (int i = 0; i < lanes; ++i) total += of_thread[thread * lanes + i];
      const int64_t c = chunk * p.boxes.k + thread;
      if (p.partial != nullptr)
        p.partial[part * p.boxes.channels + c] = total;
      else
        p.db[c] = static_cast<float>(total);
    }
    __syncthreads();
  }
  if (!strength) return;
  of_strength = BlockTeam().reduce(of_strength, Add());
  if (thread != 0) return;
  if (p.partial != nullptr)
    p.partial[p.parts * p.boxes.channels + blockIdx.x] = of_strength;
  else
    *p.d_strength = static_cast<float>(of_strength);
}

// Adds the parts: a block 32 channels, its warps every 32nd part, then those in order; one block
// more the strength's.
constexpr int kAdders = 32;
__global__ void __launch_bounds__(32 * kAdders, 1)
    add_parts(const double* partial, int64_t channels, int64_t parts, int64_t chunks, float* db,
              float* d_strength) {
  GENFAST_SHARED(double[kAdders][32], of_warp);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  double total = 0;
  if (db == nullptr || blockIdx.x * int64_t{32} >= channels) {
    for (int64_t i = threadIdx.x; i < parts * chunks; i += 32 * kAdders)
      total += partial[parts * channels + i];
    total = BlockTeam().reduce(total, Add());
    if (threadIdx.x == 0) *d_strength = static_cast<float>(total);
    return;
  }
  if (c < channels) {
#pragma unroll 4
    for (int64_t i = warp; i < parts; i += kAdders) total += partial[i * channels + c];
  }
  of_warp[warp][lane] = total;
  __syncthreads();
  if (warp != 0 || c >= channels) return;
  for (int i = 1; i < kAdders; ++i) total += of_warp[i][lane];
  db[c] = static_cast<float>(total);
}

// The dense memory of t as one row.
Stage flat(const TensorView& t) {
  TensorView row = t;
  row.ndim = 1, row.shape[0] = t.numel, row.strides[0] = 1;
  return Stage(row);
}

}  // namespace

const char* bias_act(const BiasActParams& p) {
  if (p.x.numel == 0) return nullptr;
  const Added added(p, true, true);
  const Forward op{Boxes(p.planes, added.has_noise, false),
                   added,
                   flat(p.x),
                   flat(p.y),
                   p.act,
                   p.alpha,
                   p.gain,
                   p.clamp};
  return launch(act_forward, blocks_for(op.boxes.count * op.boxes.chunks, 1), dim3(kBlock), 0, p.x,
                op);
}

const char* bias_act_backward(const BiasActBackwardParams& q) {
  const BiasActParams& p = q.forward;
  const bool sums = q.db.defined(), strength = q.d_strength.defined();
  if (p.x.numel == 0 && !sums && !strength) return nullptr;
  const Added added(p, !q.from_y, !q.from_y || strength);
  const Boxes boxes(p.planes, added.has_noise, sums);
  Backward op{boxes,
              added,
              flat(p.x),
              flat(q.grad),
              flat(q.dz),
              static_cast<float*>(q.db.data),
              static_cast<float*>(q.d_strength.data),
              nullptr,
              1,
              p.act,
              p.alpha,
              p.gain,
              p.clamp,
              q.from_y};
  int64_t at_once = at_least_one(boxes.chunks);
  const int64_t row = boxes.channels + boxes.chunks;  // doubles of a part
  if (!sums && !strength) {
    op.parts = least(boxes.count, 0x7FFFFFFF / at_once);
  } else if (q.scratch.defined() && q.scratch.numel >= row && p.x.numel > 0) {
    op.partial = static_cast<double*>(q.scratch.data);
    op.parts = least(boxes.count, least(q.scratch.numel / row, at_least_one(kParts / at_once)));
  } else if (strength) {
    at_once = 1;  // one block makes all of it
  }
  const char* error = launch(act_backward, dim3(static_cast<unsigned>(op.parts * at_once)),
                             dim3(kBlock), sums ? sizeof(Strip<kBox>) : 0, p.x, op);
  if (error != nullptr || op.partial == nullptr) return error;
  const int64_t blocks = (sums ? ceiling(boxes.channels, 32) : 0) + strength;
  return launch(add_parts, dim3(static_cast<unsigned>(blocks)), dim3(32 * kAdders), 0, p.x,
                op.partial, boxes.channels, op.parts, boxes.chunks, op.db, op.d_strength);
}

}  // namespace genfast::cuda
