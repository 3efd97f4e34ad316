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

typedef uint32_t Words __attribute__((vector_size(16)));

// Reads every byte; the sum only keeps the compiler from dropping the loads.
uint32_t read_all(const char* data, int64_t bytes) {
  Words sum[4] = {};
  const Words* words = reinterpret_cast<const Words*>(data);
  for (int64_t i = 0; i < bytes / 16; i += 4) {
    for (int j = 0; j < 4; j++) sum[j] += words[i + j];
  }
  const Words total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  return total[0] + total[1] + total[2] + total[3];
}

double read_gb_s(Pool& pool, double seconds, int64_t buffer_bytes) {
  const int64_t tiles = std::max<int64_t>(1, buffer_bytes / kReadTile);
  Buffer buffer(tiles * kReadTile);
  pool.parallel(tiles,
                [&](int64_t tile, int) { std::memset(buffer.data() + tile * kReadTile, 1, kReadTile); });
  std::atomic<uint32_t> sink{0};
  std::vector<double> rates;
  const double begin = seconds_now();
  while (rates.size() < 3 || (seconds_now() - begin < seconds && rates.size() < 1000)) {
    const double start = seconds_now();
    pool.parallel(tiles, [&](int64_t tile, int) {
      sink.fetch_add(read_all(buffer.data() + tile * kReadTile, kReadTile), std::memory_order_relaxed);
    });
    rates.push_back(double(tiles * kReadTile) / (seconds_now() - start) / 1e9);
  }
  return median(rates);
}

}  // namespace

Probe probe(Pool& pool, const char* isa, double seconds, int64_t buffer_bytes) {
  const Kernels* kernels = find_kernels(isa);
  if (kernels == nullptr) {
    throw std::invalid_argument("probe: this machine has no kernels for isa '" + std::string(isa) +
                                "'; the best it has is '" + best_isa() + "'");
  }
  Probe result;
  result.read_gb_s = read_gb_s(pool, seconds, buffer_bytes);
  result.int8_gmacs = peak_gmacs(pool, kernels->peak_int8, seconds);
  result.bf16_gmacs = peak_gmacs(pool, kernels->peak_bf16, seconds);
  result.fp32_gmacs = peak_gmacs(pool, kernels->peak_fp32, seconds);
  return result;
}

}  // namespace gossamer
