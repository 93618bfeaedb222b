// Scratch memory of one call: its layout, and one slot per thread, taken for the length of a task.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace genfast::cpu {
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
  explicit Memory(int64_t bytes)
      : data_(static_cast<char*>(std::aligned_alloc(64, round_up(bytes > 0 ? bytes : 1, 64)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
};

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
