// A small SIMT machine on the host: it runs the very .cu files of csrc/cuda, compiled as C++.
//
// A block is a group of fibers, one per CUDA thread, run one after another on one OS thread. A
// fiber runs until it must wait (barrier, warp operation) or returns. The order of fibers and
// blocks, the bytes that shared memory starts with and the time at which asynchronous copies land
// can be changed: a kernel without a race and without a read of uninitialised shared memory gives
// the same bits under all of them.
//
// Refused with a text that says where: barriers that threads reach at different places or never,
// warp operations whose mask names a lane that exited or is absent, more shared memory than asked
// for. Every shared array is its own heap block, so AddressSanitizer sees overruns.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using uint3 = dim3;
extern dim3 blockIdx, blockDim, gridDim;  // no macros: the launch configuration has such fields

namespace simt {

struct Site {  // where a thread waits; `Site::here()` as a default argument is the caller's place
  const char* file;
  int line;
  static constexpr Site here(const char* f = __builtin_FILE(), int l = __builtin_LINE()) {
    return {f, l};
  }
};

struct Copy {  // an asynchronous copy that has not landed yet
  void* to;
  const void* from;
  int bytes, total;  // the rest of `total` is zero
};

struct Thread {
  dim3 index;
  unsigned linear, lane, warp;
  bool done;
  const uint32_t* gate;  // waits until *gate != seen
  uint32_t seen;
  Site site;
  void* stack_pointer;
  void* fake_stack;  // AddressSanitizer's
  // cp.async: copies of the group being filled, then closed groups, oldest first
  Copy copies[256];
  int n_copies, n_groups, group_end[64];
};

extern Thread* self;

// Stops the kernel; the launch returns an error with this text.
[[noreturn]] void fail(const char* format, ...);
void wait(const uint32_t* gate, Site site);

// Barrier `id` of the block for `count` threads (0: every thread that has not exited).
// Returns the bitwise or of what the threads brought, and their number with a nonzero value.
struct Votes {
  unsigned any, count, threads;
};
Votes barrier(int id, int count, unsigned value, Site site);

// All lanes of `mask` bring `size` bytes; the last to arrive calls body(in, out), arrays of 32 such
// slots, once; each lane leaves with its slot of `out`.
constexpr int kSlot = 64;
using MeetBody = void (*)(const unsigned char (*in)[kSlot], unsigned char (*out)[kSlot],
                          uint32_t mask, const void* context);
void meet(uint32_t mask, const void* in, int in_size, void* out, int out_size, MeetBody body,
          const void* context, Site site);

void* shared_array(const void* key, size_t bytes);  // the same memory for all threads of a block
void* dynamic_shared();

void copy_async(void* to, const void* from, int bytes, int total);
void copy_commit();
void copy_wait(int keep);

// Runs `call(context)` in every thread of the grid. Null, or why it failed. limit: of shared
// memory, static arrays included.
const char* run(dim3 grid, dim3 block, size_t shared, size_t limit, void (*call)(const void*),
                const void* context);

struct Options {
  int order = 0;                        // 0: as numbered; 1: reversed; else: shuffled by this seed
  int poison = 0xFF;                    // byte that fills shared memory: 0xFF makes NaNs and -1
  bool early = false;                   // asynchronous copies land at once, else when waited for
  int generation = 8;                   // major number of the compute capability
  int multiprocessor_kib = 164;         // shared memory that the device says it has
  int64_t launches = 0, threads = 0;    // counted
  int64_t matrices = 0, conflicts = 0;  // 8 x 8 matrices read, pairs of rows in the same banks
  int64_t products = 0;                 // of warpgroups, once per warp
};
extern Options options;

template <class T>
T shuffle(uint32_t mask, T value, int source(int lane, int operand, int width), int operand,
          int width, Site site) {
  struct Context {
    int (*source)(int, int, int);
    int operand, width;
  };
  struct Pack {  // a lane may read another source and width than its neighbour
    T value;
    Context c;
  };
  static_assert(sizeof(Pack) <= kSlot, "shuffled value too large");
  Pack pack;
  memset(static_cast<void*>(&pack), 0, sizeof pack);
  pack.value = value, pack.c = {source, operand, width};
  T result;
  meet(
      mask, &pack, sizeof pack, &result, sizeof result,
      [](const unsigned char (*in)[kSlot], unsigned char (*out)[kSlot], uint32_t m, const void*) {
        for (int lane = 0; lane < 32; ++lane) {
          if (!(m >> lane & 1)) continue;
          Pack mine, other;
          memcpy(static_cast<void*>(&mine), in[lane], sizeof mine);
          const int from = mine.c.source(lane, mine.c.operand, mine.c.width);
          if (!(m >> from & 1)) {  // undefined on a GPU: give something that stands out
            memset(out[lane], 0xFF, sizeof(T));
            continue;
          }
          memcpy(static_cast<void*>(&other), in[from], sizeof other);
          memcpy(out[lane], &other.value, sizeof(T));
        }
      },
      nullptr, site);
  return result;
}

inline uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  uint32_t result;
  const unsigned char bit = predicate;
  meet(
      mask, &bit, 1, &result, sizeof result,
      [](const unsigned char (*in)[kSlot], unsigned char (*out)[kSlot], uint32_t m, const void*) {
        uint32_t all = 0;
        for (int lane = 0; lane < 32; ++lane)
          if (m >> lane & 1) all |= static_cast<uint32_t>(in[lane][0]) << lane;
        for (int lane = 0; lane < 32; ++lane) memcpy(out[lane], &all, sizeof all);
      },
      nullptr, site);
  return result;
}

}  // namespace simt
