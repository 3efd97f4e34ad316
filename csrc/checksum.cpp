#include "checksum.h"

#include <algorithm>
#include <cstring>

namespace gossamer {
namespace {

constexpr int kLanes = 8;  // independent chains, which hide the multiplication's latency
constexpr uint64_t kOdd =
    0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio: odd, so the product is a bijection
constexpr int64_t kStride = kLanes * sizeof(uint64_t);

// Any change of one word changes its lane for good: every step is a bijection of the lane. The shift brings
// high bits down, which a multiplication alone never does.
inline uint64_t mix(uint64_t sum, uint64_t word) {
  const uint64_t product = (sum ^ word) * kOdd;
  return product ^ (product >> 29);
}

uint64_t checksum(const uint8_t* data, int64_t bytes) {
  uint64_t lane[kLanes];
  for (int j = 0; j < kLanes; j++) lane[j] = uint64_t(j + 1) * kOdd;
  int64_t at = 0;
  for (; at + kStride <= bytes; at += kStride) {
    for (int j = 0; j < kLanes; j++) {
      uint64_t word;
      std::memcpy(&word, data + at + j * 8, 8);
      lane[j] = mix(lane[j], word);
    }
  }
  uint64_t sum = uint64_t(bytes);
  for (; at < bytes; at++) sum = mix(sum, data[at]);
  for (int j = 0; j < kLanes; j++) sum = mix(sum, lane[j]);
  return sum;
}

}  // namespace

void checksums(Pool& pool, const uint8_t* data, int64_t bytes, uint64_t* sums) {
  pool.parallel((bytes + kChecksumBlock - 1) / kChecksumBlock, [&](int64_t block, int) {
    const int64_t from = block * kChecksumBlock;
    sums[block] = checksum(data + from, std::min(kChecksumBlock, bytes - from));
  });
}

}  // namespace gossamer
