// What this machine can do at most: register-only loops and a streaming read, on the pool's threads.
#pragma once
#include "api.h"
#include "threads.h"

namespace gossamer {

struct Probe {
  double read_gb_s;   // DRAM streaming read, over a buffer far larger than the caches
  double int8_gmacs;  // int8 multiply-accumulates with this ISA's best instruction
  double bf16_gmacs;
  double fp32_gmacs;
};

// seconds: rough time to spend on each figure. buffer_bytes: size of the read buffer (all threads together).
Probe probe(Pool& pool, const char* isa, double seconds, int64_t buffer_bytes);

}  // namespace gossamer
