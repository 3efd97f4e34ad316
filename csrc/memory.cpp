#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace gossamer {

#ifdef __SANITIZE_ADDRESS__

// From the allocator, so that every block lies between red zones.
uint8_t* map_memory(int64_t bytes) {
  void* block = nullptr;
  if (posix_memalign(&block, 64, size_t(bytes)) != 0) throw std::bad_alloc();
  return static_cast<uint8_t*>(std::memset(block, 0, size_t(bytes)));
}

void unmap_memory(uint8_t* address, int64_t) { std::free(address); }

#else

namespace {
constexpr int64_t kHuge = int64_t(2) << 20;
}

uint8_t* map_memory(int64_t bytes) {
  const int64_t slack = bytes >= kHuge ? kHuge : 0;
  void* raw = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  uint8_t* start = static_cast<uint8_t*>(raw);
  if (!slack) return start;
  // Keep the aligned middle and give both ends back: a huge page must start at a multiple of its size.
  uint8_t* aligned =
      reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(start) + kHuge - 1) / kHuge * kHuge);
  if (aligned > start) munmap(start, aligned - start);
  const int64_t tail = start + slack - aligned;
  const int64_t page = 4096, kept = (bytes + page - 1) / page * page;
  if (tail > 0 && kept < bytes + tail) munmap(aligned + kept, bytes + tail - kept);
#ifdef MADV_HUGEPAGE
  madvise(aligned, kept, MADV_HUGEPAGE);
#endif
  return aligned;
}

void unmap_memory(uint8_t* address, int64_t bytes) { munmap(address, (bytes + 4095) / 4096 * 4096); }

#endif

}  // namespace gossamer
