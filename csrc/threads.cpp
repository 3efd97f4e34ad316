#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

namespace gossamer {
namespace {

constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kSpinBatch = 64;  // pauses between two looks at the clock

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// True as soon as done() is, false after the spinning time.
template <class F>
bool spin_until(F&& done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kSpinBatch; i++) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

std::vector<int> allowed_processors() {
  std::vector<int> cpus;
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    }
  }
#endif
  return cpus;
}

void pin_to(int cpu) {
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // a refusal costs speed only
#else
  (void)cpu;
#endif
}

}  // namespace

// A worker's own stretch of a job's tiles. It takes them from the front, so that it walks through memory in
// one direction and finds the next tile asked for already; the others take from the back once they have
// finished theirs.
class alignas(64) Stretch {
 public:
  void set(int64_t begin, int64_t end) { both_.store(pack(begin, end), std::memory_order_relaxed); }
  bool take_front(int64_t& tile) {
    return take([&](uint64_t begin, uint64_t end) {
      tile = int64_t(begin);
      return pack(int64_t(begin) + 1, int64_t(end));
    });
  }
  bool take_back(int64_t& tile) {
    return take([&](uint64_t begin, uint64_t end) {
      tile = int64_t(end) - 1;
      return pack(int64_t(begin), int64_t(end) - 1);
    });
  }

 private:
  static uint64_t pack(int64_t begin, int64_t end) { return uint64_t(end) << 32 | uint64_t(begin); }
  template <class F>
  bool take(F&& rest) {
    uint64_t now = both_.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t begin = now & 0xffffffff, end = now >> 32;
      if (begin >= end) return false;
      if (both_.compare_exchange_weak(now, rest(begin, end), std::memory_order_relaxed)) return true;
    }
  }
  std::atomic<uint64_t> both_{0};  // begin, and end above it
};

// A job is done when its tiles are, not when every worker has seen it: a worker that sleeps or has lost its
// core keeps nobody waiting. Workers therefore enter a job through a gate. The caller opens it once the
// job's fields are written, and closes it once no tile is left; the fields may change when the gate is
// closed and nobody is inside.
struct Pool::State {
  static constexpr int kClosed = 1 << 30;  // beside the number of workers inside

  std::vector<std::thread> threads;
  int size = 1;
  std::mutex running;  // run() from several threads takes turns

  Fn fn = nullptr;
  void* context = nullptr;
  std::unique_ptr<Stretch[]> stretches;  // one for each worker

  alignas(64) std::atomic<int> gate{kClosed};
  alignas(64) std::atomic<uint64_t> epoch{0};  // raised by every job, and to stop
  std::atomic<bool> stop{false};

  std::mutex mutex;  // guards sleeping only
  std::condition_variable wake, idle;
  std::atomic<int> sleepers{0};
  std::atomic<bool> caller_sleeps{false};

  // Sequentially consistent on both sides: either this sees the sleeper, or the sleeper sees the epoch.
  void announce() {
    epoch.fetch_add(1);
    if (sleepers.load() == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    wake.notify_all();
  }

  void await_epoch(uint64_t seen) {
    if (spin_until([&] { return epoch.load(std::memory_order_acquire) != seen; })) return;
    std::unique_lock<std::mutex> lock(mutex);
    sleepers.fetch_add(1);
    wake.wait(lock, [&] { return epoch.load() != seen; });
    sleepers.fetch_sub(1);
  }

  void take_tiles(int worker) {
    int64_t tile;
    while (stretches[worker].take_front(tile)) fn(context, tile, worker);
    for (int i = 1; i < size; i++) {
      while (stretches[(worker + i) % size].take_back(tile)) fn(context, tile, worker);
    }
  }

  // Entering a closed gate is allowed, but must be followed by leaving it at once.
  void join(int worker) {
    if ((gate.fetch_add(1) & kClosed) == 0) take_tiles(worker);
    if (gate.fetch_sub(1) == kClosed + 1 && caller_sleeps.load()) {
      std::lock_guard<std::mutex> lock(mutex);
      idle.notify_one();
    }
  }

  void close() {
    gate.fetch_or(kClosed);
    if (spin_until([&] { return gate.load(std::memory_order_acquire) == kClosed; })) return;
    std::unique_lock<std::mutex> lock(mutex);
    caller_sleeps.store(true);
    idle.wait(lock, [&] { return gate.load() == kClosed; });
    caller_sleeps.store(false);
  }

  void end();  // stops the workers and waits for them

  void work(int worker, int cpu) {
    if (cpu >= 0) pin_to(cpu);
    for (uint64_t seen = 0; !stop.load();) {
      await_epoch(seen);
      seen = epoch.load();
      join(worker);
    }
  }
};

void Pool::State::end() {
  stop.store(true);
  announce();
  for (std::thread& thread : threads) thread.join();
}

Pool::Pool(int threads) : state_(new State) {
  const std::vector<int> cpus = allowed_processors();
  const int processors = cpus.empty() ? int(std::thread::hardware_concurrency()) : int(cpus.size());
  state_->size = threads > 0 ? threads : (processors > 0 ? processors : 1);
  state_->stretches.reset(new Stretch[size_t(state_->size)]);
  for (int worker = 1; worker < state_->size; worker++) {
    // With more workers than processors there is nothing to gain from pinning.
    const int cpu = state_->size <= int(cpus.size()) ? cpus[size_t(worker)] : -1;
    try {
      state_->threads.emplace_back([state = state_.get(), worker, cpu] { state->work(worker, cpu); });
    } catch (const std::system_error&) {
      state_->end();  // those that run would otherwise be waited for without end
      throw;
    }
  }
}

Pool::~Pool() { state_->end(); }

int Pool::size() const { return state_->size; }

void Pool::run(int64_t tiles, Fn fn, void* context) {
  if (tiles <= 0) return;
  if (tiles > INT32_MAX) throw std::length_error("a job of more than 2^31 tiles");
  if (tiles == 1 || state_->size == 1) {
    for (int64_t tile = 0; tile < tiles; tile++) fn(context, tile, 0);
    return;
  }
  std::lock_guard<std::mutex> turn(state_->running);
  state_->fn = fn;
  state_->context = context;
  for (int64_t worker = 0; worker < state_->size; worker++)
    state_->stretches[worker].set(tiles * worker / state_->size, tiles * (worker + 1) / state_->size);
  state_->gate.fetch_and(~State::kClosed);
  state_->announce();
  state_->take_tiles(0);
  state_->close();
}

}  // namespace gossamer
