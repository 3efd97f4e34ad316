#include "probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"

namespace gossamer {
namespace {

constexpr int kRepeats = 7;
constexpr int64_t kTilesPerThread = 8;  // so that a thread that starts late or is preempted is made up for
constexpr int64_t kReadTile = int64_t(1) << 20;
constexpr int64_t kSlack = int64_t(64) << 10;  // past the end, for prefetches

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + long(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// Multiply-accumulates per second, in 1e9, of one register-only loop on all threads.
double peak_gmacs(Pool& pool, int64_t (*loop)(int64_t steps), double seconds) {
  int64_t steps = 1 << 12;  // of one tile; doubled until a repeat takes its share of the time
  std::vector<double> rates;
  while (int(rates.size()) < kRepeats) {
    std::atomic<int64_t> macs{0};
    const double start = seconds_now();
    pool.parallel(pool.size() * kTilesPerThread,
                  [&](int64_t, int) { macs.fetch_add(loop(steps), std::memory_order_relaxed); });
    const double took = seconds_now() - start;
    if (took < seconds / kRepeats / 2) {
      steps *= 2;
    } else {
      rates.push_back(double(macs.load()) / took / 1e9);
    }
  }
  return median(rates);
}

// Memory as the weights have it.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(bytes), data_(map_memory(bytes)) {}
  ~Buffer() { unmap_memory(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() { return reinterpret_cast<char*>(data_); }

 private:
  int64_t bytes_;
  uint8_t* data_;
};

// How the kernels might read. None is the fastest on every machine and every day, so all of them take turns
// and the best median is the limit.
struct Loop {
  int streams;
  int64_t ahead, tile;
};
constexpr Loop kLoops[] = {
    {1, 0, kReadTile},
    {2, 0, kReadTile},
    {1, 8 << 10, kReadTile},
    {2, 4 << 10, kReadTile},
    {2, 4 << 10, 64 * kReadTile},
};
constexpr int kLoopCount = int(sizeof kLoops / sizeof kLoops[0]);

double read_gb_s(Pool& pool, const Kernels& kernels, double seconds, int64_t buffer_bytes) {
  const int64_t bytes = std::max<int64_t>(1, buffer_bytes / kReadTile) * kReadTile;
  Buffer buffer(bytes + kSlack);
  char* data = buffer.data();
  const int64_t tiles = bytes / kReadTile;
  pool.parallel(tiles, [&](int64_t tile, int) { std::memset(data + tile * kReadTile, 1, kReadTile); });
  std::atomic<uint32_t> sink{0};
  std::vector<double> rates[kLoopCount];
  const double begin = seconds_now();
  for (int round = 0; round < 3 || (seconds_now() - begin < seconds && round < 1000); round++) {
    for (int i = 0; i < kLoopCount; i++) {
      const Loop& loop = kLoops[i];
      const double start = seconds_now();
      pool.parallel((bytes + loop.tile - 1) / loop.tile, [&](int64_t tile, int) {
        const int64_t from = tile * loop.tile;
        sink.fetch_add(kernels.read(data + from, std::min(loop.tile, bytes - from), loop.streams, loop.ahead),
                       std::memory_order_relaxed);
      });
      rates[i].push_back(double(bytes) / (seconds_now() - start) / 1e9);
    }
  }
  double best = 0;
  for (std::vector<double>& loop : rates) best = std::max(best, median(loop));
  return best;
}

}  // namespace

Probe probe(Pool& pool, const char* isa, double seconds, int64_t buffer_bytes) {
  const Kernels* kernels = find_kernels(isa);
  if (kernels == nullptr) {
    throw std::invalid_argument("probe: this machine has no kernels for isa '" + std::string(isa) +
                                "'; the best it has is '" + best_isa() + "'");
  }
  Probe result;
  result.read_gb_s = read_gb_s(pool, *kernels, seconds, buffer_bytes);
  result.int8_gmacs = peak_gmacs(pool, kernels->peak_int8, seconds);
  result.bf16_gmacs = peak_gmacs(pool, kernels->peak_bf16, seconds);
  result.fp32_gmacs = peak_gmacs(pool, kernels->peak_fp32, seconds);
  return result;
}

}  // namespace gossamer
