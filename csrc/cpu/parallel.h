// Threads of the CPU kernels. No OpenMP dependency: the runtime that is already in the process
// (torch's) is bound at the first call, because a second libgomp costs 10x when its kernels
// alternate with torch's (measured). Without one, a small blocking pool of std::thread.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>

namespace genfast::cpu {

// Runs body(context, task) for task in [0, tasks), each exactly once, on at most `threads` threads
// (0 = hardware concurrency). Tasks are begun in their order, so one may wait for an earlier one;
// results must not depend on the number of threads.
void run_tasks(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context);

template <class Fn>
void parallel_for(int64_t tasks, int threads, Fn&& fn) {
  if (threads == 1 || tasks < 2) {
    for (int64_t i = 0; i < tasks; ++i) fn(i);
    return;
  }
  run_tasks(
      tasks, threads, [](void* f, int64_t i) { (*static_cast<decltype(&fn)>(f))(i); },
      static_cast<void*>(&fn));
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
