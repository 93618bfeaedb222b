// Scratch memory of one call: its layout, and one slot per thread, taken for the length of a task.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace genfast::cpu {

// Scratch memory, 64-byte aligned, which the calling thread keeps for its next call: up to 8 MiB.
// Freed each time, it went back to the system and came as fresh pages: 250 to 1000 page faults in a
// VAE's training step, up to 0.7 of 2.4 ms. Given back by the thread that took it. Throws
// bad_alloc.
char* take_scratch(int64_t bytes);
void give_scratch(char* data);

namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Leading dimension of n floats: whole vectors, an odd number of 64-byte lines.
constexpr int64_t odd_lines(int64_t n) {
  const int64_t lines = round_up(n, 16) / 16;
  return 16 * (lines % 2 ? lines : lines + 1);
}

// Scratch memory handed out in order; run with base = null first to learn the size.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = base != nullptr ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
};

class Memory {
 public:
  // Made on the calling thread, where an exception can leave.
  explicit Memory(int64_t bytes) : data_(take_scratch(bytes)) {}
  ~Memory() { give_scratch(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
};

// What a call's tasks hand on, not filled, in memory that the thread keeps: freed each time, 1.5
// MiB of sums made glibc give 50 MiB of tensors back to the system at every training step, and
// 100,000 doubles came as 200 fresh pages at every call.
template <class T>
class Held {
 public:
  explicit Held(int64_t n)
      : memory_(n > 0 ? n * static_cast<int64_t>(sizeof(T)) : static_cast<int64_t>(sizeof(T))) {}
  operator T*() const { return reinterpret_cast<T*>(memory_.data()); }

 private:
  Memory memory_;
};

// std::vector for kernel files. The linker keeps one copy of an ordinary one's functions for all
// levels, whose instructions a lesser processor may not have: through an allocator of this file's
// own they are this file's own.
template <class T>
struct OwnCode : std::allocator<T> {
  template <class U>
  struct rebind {
    using other = OwnCode<U>;
  };
};
template <class T>
using Vector = std::vector<T, OwnCode<T>>;

class Slots {
 public:
  Slots(int count, int64_t bytes)
      : count_(count < kMost ? count : kMost),
        bytes_(round_up(bytes, 4096) + 64),
        memory_(count_ * bytes_) {}
  int count() const { return count_; }

  template <class Fn>
  void with(Fn&& fn) {
    int slot = 0;
    while (busy_[slot].exchange(true, std::memory_order_acquire)) slot = (slot + 1) % count_;
    fn(memory_.data() + slot * bytes_);
    busy_[slot].store(false, std::memory_order_release);
  }

 private:
  static constexpr int kMost = 1024;
  int count_;
  int64_t bytes_;
  Memory memory_;
  std::atomic<bool> busy_[kMost] = {};
};

}  // namespace
}  // namespace genfast::cpu
