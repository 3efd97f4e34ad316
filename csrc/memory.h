// Large blocks of memory on huge pages, where the system gives them.
#pragma once
#include <cstdint>

namespace gossamer {

// Zeroed memory, aligned to 2 MiB from there up (else to a page). Throws std::bad_alloc.
uint8_t* map_memory(int64_t bytes);
void unmap_memory(uint8_t* address, int64_t bytes);

}  // namespace gossamer
