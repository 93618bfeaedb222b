#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace genfast::cpu {
namespace {

// Tasks that were not begun yet, on a cache line of its own: every thread may count in it.
struct alignas(64) Range {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Job {
  int64_t ranges;
  void (*body)(void*, int64_t);
  void* context;
  std::unique_ptr<Range[]> left;
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // the first; it may leave neither runtime's threads

  Job(int64_t tasks, int64_t n, void (*b)(void*, int64_t), void* c)
      : ranges(n), body(b), context(c), left(new Range[n]) {
    for (int64_t r = 0; r < n; ++r) {
      left[r].next.store(tasks / n * r + std::min(r, tasks % n), std::memory_order_relaxed);
      left[r].end = tasks / n * (r + 1) + std::min(r + 1, tasks % n);
    }
  }
  // The tasks of a thread: of its own range, then what is left of the others.
  void work(int64_t thread) {
    try {
      for (int64_t r = 0; r < ranges; ++r) {
        Range& range = left[(thread + r) % ranges];
        for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
          body(context, i);
      }
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      for (int64_t r = 0; r < ranges; ++r)  // the rest is not begun
        left[r].next.store(left[r].end, std::memory_order_relaxed);
    }
  }
};

// A function of OpenMP's runtime, looked up again until found: torch may be imported after us.
template <class Fn>
class Late {
 public:
  explicit constexpr Late(const char* name) : name_(name) {}
  Fn get() {
    Fn f = found_.load(std::memory_order_relaxed);
    if (f == nullptr) {
      f = reinterpret_cast<Fn>(dlsym(RTLD_DEFAULT, name_));
      found_.store(f, std::memory_order_relaxed);
    }
    return f;
  }

 private:
  const char* name_;
  std::atomic<Fn> found_{nullptr};
};

Late<void (*)(void (*)(void*), void*, unsigned, unsigned)> g_parallel("GOMP_parallel");
Late<int (*)()> g_thread_number("omp_get_thread_num");
std::atomic<bool> g_forked{false};  // a child must not wake the parent's OpenMP team

bool gomp() {
  return !g_forked.load(std::memory_order_relaxed) && g_parallel.get() != nullptr &&
         g_thread_number.get() != nullptr;
}

void run_with_gomp(Job& job, int threads) {
  const auto work = [](void* job) { static_cast<Job*>(job)->work(g_thread_number.get()()); };
  g_parallel.get()(work, &job, static_cast<unsigned>(threads), 0);
}

// A blocking pool: no spinning, so it never steals a core from another runtime.
class Pool {
 public:
  void run(Job& job, int threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return job.work(0);  // busy with another caller: do it alone
    try {
      while (static_cast<int>(workers_.size()) < threads - 1)
        workers_.emplace_back([this, number = workers_.size() + 1, generation = generation_] {
          loop(static_cast<int64_t>(number), generation);
        });
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
    job.work(0);
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
  void loop(int64_t number, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || (generation_ != seen && invited_ > 0); });
      if (stop_) return;
      seen = generation_;
      --invited_;
      Job* job = job_;
      lock.unlock();
      job->work(number);
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

void run_tasks(int64_t tasks, int threads, Order order, void (*body)(void*, int64_t),
               void* context) {
  if (threads <= 0) threads = static_cast<int>(std::thread::hardware_concurrency());
  if (threads > tasks) threads = static_cast<int>(tasks);
  Job job(tasks, order == Order::own_first ? std::max(threads, 1) : 1, body, context);
  if (threads <= 1)
    job.work(0);
  else if (gomp())
    run_with_gomp(job, threads);
  else
    pool().run(job, threads);
  if (job.error) std::rethrow_exception(job.error);
}

const char* thread_runtime() { return gomp() ? "gomp" : "std::thread"; }

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
