// A team of threads that run one function to its end, and meet at barriers on the way.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <new>

namespace macaw {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Threads spin for a moment, for their work is alike; then they yield, for the processor may be someone else's.
class Barrier {
 public:
  explicit Barrier(int num_threads) : num_threads_(num_threads) {}

  void wait() {
    if (num_threads_ == 1) return;
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins < 4000) {
        relax();
      } else {
        sched_yield();
      }
    }
  }

 private:
  const int num_threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

// Hands out the numbers 0, 1, ... to whoever asks, so that the fast take more. Reset between uses by one thread.
class Counter {
 public:
  int64_t next() { return value_.fetch_add(1, std::memory_order_relaxed); }
  void reset() { value_.store(0, std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int64_t> value_{0};
};

struct Team {
  int thread;
  int num_threads;
  Barrier* barrier;
};

// Run `work(Team)` on up to `num_threads` threads; the runtime may give fewer.
template <class Work>
void run_team(int num_threads, const Work& work) {
  if (num_threads <= 1) {
    Barrier barrier(1);
    work(Team{0, 1, &barrier});
    return;
  }
  Barrier* shared = nullptr;
  alignas(64) unsigned char memory[sizeof(Barrier)];
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp single
    shared = new (memory) Barrier(omp_get_num_threads());
    work(Team{omp_get_thread_num(), omp_get_num_threads(), shared});
  }
}

}  // namespace macaw
