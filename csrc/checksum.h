// A checksum that keeps up with memory: it finds damage on disk, not forgery.
#pragma once
#include <cstdint>

#include "threads.h"

namespace gossamer {

constexpr int64_t kChecksumBlock = int64_t(1) << 20;

// One sum for each block of kChecksumBlock bytes of data (the last may be shorter), on the pool's threads.
// sums: [(bytes + kChecksumBlock - 1) / kChecksumBlock].
void checksums(Pool& pool, const uint8_t* data, int64_t bytes, uint64_t* sums);

}  // namespace gossamer
