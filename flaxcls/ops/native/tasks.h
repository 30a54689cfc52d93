// Work shared out among XLA's own threads. A second pool would fight with them for the cores.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

namespace flaxcls {

class Tasks {
 public:
  // `pool` is XLA's (xla::ffi::ThreadPool) or anything else with its two methods.
  template <class Pool>
  explicit Tasks(Pool pool)
      : threads_(std::max<int64_t>(1, pool.num_threads())),
        schedule_([pool](std::function<void()> work) mutable { pool.Schedule(std::move(work)); }) {}

  int64_t threads() const { return threads_; }

  // Calls f(0) ... f(n - 1), in any order and on any thread, and returns when all have returned.
  // The caller works too, and waits only for calls that have begun: no free thread, no delay.
  // Throws what one of the calls has thrown.
  void Run(int64_t n, const std::function<void(int64_t)>& f) {
    if (n <= 1 || threads_ == 1) {
      for (int64_t i = 0; i < n; ++i) f(i);
      return;
    }
    auto job = std::make_shared<Job>(n, &f);  // outlives this call where a thread comes too late
    for (int64_t i = 1; i < std::min(n, threads_); ++i) schedule_([job] { job->Work(); });
    job->Work();
    while (job->done.load(std::memory_order_acquire) < n) Pause();
    if (job->thrown) std::rethrow_exception(job->thrown);
  }

  // Calls f(begin, end) for consecutive parts of 0 ... n, each of at least `grain`.
  void RunParts(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
    const int64_t parts = std::clamp<int64_t>(n / std::max<int64_t>(1, grain), 1, 4 * threads_);
    Run(parts, [&](int64_t i) { f(n * i / parts, n * (i + 1) / parts); });
  }

 private:
  struct Job {
    Job(int64_t n, const std::function<void(int64_t)>* f) : n(n), f(f) {}

    void Work() {
      for (int64_t i; (i = next.fetch_add(1)) < n;) {
        try {
          (*f)(i);
        } catch (...) {
          std::lock_guard<std::mutex> lock(mutex);
          thrown = std::current_exception();
        }
        done.fetch_add(1, std::memory_order_release);
      }
    }

    const int64_t n;
    const std::function<void(int64_t)>* f;  // alive while done < n
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::exception_ptr thrown;
  };

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  int64_t threads_;
  std::function<void(std::function<void()>)> schedule_;
};

}  // namespace flaxcls
