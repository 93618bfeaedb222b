#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace genfast::cpu {
namespace {

struct Job {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  void (*body)(void*, int64_t);
  void* context;
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // the first; it may leave neither runtime's threads

  Job(int64_t n, void (*b)(void*, int64_t), void* c) : tasks(n), body(b), context(c) {}
  static void work(void* self) {
    Job& job = *static_cast<Job*>(self);
    try {
      for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;)
        job.body(job.context, i);
    } catch (...) {
      if (!job.failed.exchange(true)) job.error = std::current_exception();
      job.next.store(job.tasks, std::memory_order_relaxed);  // the rest is not begun
    }
  }
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<GompParallel> g_gomp{nullptr};
std::atomic<bool> g_forked{false};  // a child must not wake the parent's OpenMP team

GompParallel gomp() {
  GompParallel f = g_gomp.load(std::memory_order_relaxed);
  if (f == nullptr) {  // looked up again until found: torch may be imported after us
    f = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    g_gomp.store(f, std::memory_order_relaxed);
  }
  return g_forked.load(std::memory_order_relaxed) ? nullptr : f;
}

// A blocking pool: no spinning, so it never steals a core from another runtime.
class Pool {
 public:
  void run(Job& job, int threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return Job::work(&job);  // busy with another caller: do it alone
    try {
      while (static_cast<int>(workers_.size()) < threads - 1)
        workers_.emplace_back([this, generation = generation_] { loop(generation); });
    } catch (const std::system_error&) {  // no more threads to be had
      threads = static_cast<int>(workers_.size()) + 1;
    }
    {
      std::lock_guard<std::mutex> guard(mutex_);
      job_ = &job;
      invited_ = threads - 1;
      active_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    Job::work(&job);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_ == 0; });
    job_ = nullptr;
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

 private:
  void loop(uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || (generation_ != seen && invited_ > 0); });
      if (stop_) return;
      seen = generation_;
      --invited_;
      Job* job = job_;
      lock.unlock();
      Job::work(job);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int invited_ = 0, active_ = 0;
  uint64_t generation_ = 0;
  bool stop_ = false;
};

Pool* g_pool = nullptr;  // leaked on purpose: at exit, and after fork, its threads are gone
std::mutex* g_pool_mutex = new std::mutex;

Pool& pool() {
  std::lock_guard<std::mutex> guard(*g_pool_mutex);
  if (g_pool == nullptr) g_pool = new Pool;
  return *g_pool;
}

const int g_at_fork = pthread_atfork(nullptr, nullptr, [] {
  g_forked.store(true);
  g_pool = nullptr;
  g_pool_mutex = new std::mutex;
});

}  // namespace

void run_tasks(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
  if (threads <= 0) threads = static_cast<int>(std::thread::hardware_concurrency());
  if (threads > tasks) threads = static_cast<int>(tasks);
  Job job(tasks, body, context);
  if (threads <= 1)
    Job::work(&job);
  else if (GompParallel parallel = gomp())
    parallel(&Job::work, &job, static_cast<unsigned>(threads), 0);
  else
    pool().run(job, threads);
  if (job.error) std::rethrow_exception(job.error);
}

const char* thread_runtime() { return gomp() != nullptr ? "gomp" : "std::thread"; }

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kHuge = int64_t{2} << 20;
  if (bytes < 2 * kHuge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t{4095};
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t{4095};
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace genfast::cpu
