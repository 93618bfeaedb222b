// Scratch memory of one call: one slot per thread, taken for the length of a task.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/attention/geometry.h"

namespace genfast::cpu {
namespace {

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
