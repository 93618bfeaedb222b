// Threads of the CPU kernels. No OpenMP dependency: the runtime that is already in the process
// (torch's) is bound at the first call, because a second libgomp costs 10x when its kernels
// alternate with torch's (measured). Without one, a small blocking pool of std::thread.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>

namespace genfast::cpu {

// Which task a thread begins next. in_order: the first that nobody began, so one may wait for an
// earlier one, and those that share memory (tiles of one matrix, keys of one head) run at once.
// own_first: of the thread's own neighbours, then of the others': what a thread wrote in the call
// before lies in its own cache (group norm of (32, 16, 28, 28) 127 -> 106 us, `add_noise` of (16,
// 4, 64, 64) 61 -> 46 us).
enum class Order { in_order, own_first };

// Runs body(context, task) for task in [0, tasks), each exactly once, on at most `threads` threads
// (0 = hardware concurrency). Results must not depend on the number of threads.
void run_tasks(int64_t tasks, int threads, Order order, void (*body)(void*, int64_t),
               void* context);

template <class Fn>
void parallel_for(int64_t tasks, int threads, Order order, Fn&& fn) {
  if (threads == 1 || tasks < 2) {
    for (int64_t i = 0; i < tasks; ++i) fn(i);
    return;
  }
  run_tasks(
      tasks, threads, order, [](void* f, int64_t i) { (*static_cast<decltype(&fn)>(f))(i); },
      static_cast<void*>(&fn));
}
template <class Fn>
void parallel_for(int64_t tasks, int threads, Fn&& fn) {
  parallel_for(tasks, threads, Order::own_first, fn);
}

// Of `threads` (0 = hardware concurrency), how many find a task.
inline int workers(int threads, int64_t tasks) {
  const int64_t most = threads > 0 ? threads : std::thread::hardware_concurrency();
  const int64_t n = most < tasks ? most : tasks;
  return n > 0 ? static_cast<int>(n) : 1;
}

// Which runtime serves: "gomp" or "std::thread".
const char* thread_runtime();

// Asks for 2 MiB pages under a large output before it is first touched: filling fresh 64 MiB
// takes 5.4 ms with it, 16.5 ms without (page faults). A hint, harmless where unsupported.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace genfast::cpu
