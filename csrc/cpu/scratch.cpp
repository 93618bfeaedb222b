#include "cpu/scratch.h"

#include <algorithm>

namespace genfast::cpu {
namespace {

struct Block {
  char* data = nullptr;
  int64_t bytes = 0;
  bool taken = false;
};

// What one thread keeps. A call takes at most three blocks at a time; the rest is other sizes'.
struct Kept {
  static constexpr int64_t kMost = int64_t{8} << 20;  // bytes, all blocks together
  Block blocks[4];

  ~Kept() {
    for (Block& b : blocks) std::free(b.data);
  }
  // The smallest free block of at least so many bytes, or the smallest free one.
  Block* find(int64_t bytes) {
    Block* best = nullptr;
    for (Block& b : blocks) {
      if (b.taken) continue;
      const bool fits = b.bytes >= bytes;
      const bool best_fits = best != nullptr && best->bytes >= bytes;
      if (best == nullptr || (fits && !best_fits) || (fits == best_fits && b.bytes < best->bytes))
        best = &b;
    }
    return best;
  }
  int64_t total() const {
    int64_t sum = 0;
    for (const Block& b : blocks) sum += b.bytes;
    return sum;
  }
};
thread_local Kept kept;

char* allocate(int64_t bytes) {
  char* data = static_cast<char*>(std::aligned_alloc(64, bytes));
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)  // which sees the end of a block, and reads before writes
char* take_scratch(int64_t bytes) { return allocate(std::max<int64_t>(round_up(bytes, 64), 64)); }
void give_scratch(char* data) { std::free(data); }
#else
char* take_scratch(int64_t bytes) {
  bytes = std::max<int64_t>(round_up(bytes, 4096), 4096);
  Block* block = kept.find(bytes);
  if (block == nullptr) return allocate(bytes);
  if (block->bytes < bytes) {
    std::free(block->data);
    *block = Block{};
    block->data = allocate(bytes);
    block->bytes = bytes;
  }
  block->taken = true;
  return block->data;
}

void give_scratch(char* data) {
  for (Block& b : kept.blocks) {
    if (b.data != data) continue;
    b.taken = false;
    if (kept.total() <= Kept::kMost) return;
    b = Block{};
    break;
  }
  std::free(data);
}
#endif

}  // namespace genfast::cpu
