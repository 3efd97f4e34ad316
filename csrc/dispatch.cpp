// Which kernels this machine can run.
#include <cstring>

#include "api.h"

namespace gossamer {
namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels* (*kernels)();
};

#ifdef __x86_64__
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi2");
}
#endif

// Best first.
constexpr Isa kIsas[] = {
#ifdef __x86_64__
    {"avx512", has_avx512, avx512_kernels},
    {"avx2", has_avx2, avx2_kernels},
#endif
    {"scalar", [] { return true; }, scalar_kernels},
};

}  // namespace

const Kernels* find_kernels(const char* isa) {
  for (const Isa& candidate : kIsas) {
    if (std::strcmp(candidate.name, isa) == 0) return candidate.supported() ? candidate.kernels() : nullptr;
  }
  return nullptr;
}

const char* best_isa() {
  for (const Isa& candidate : kIsas) {
    if (candidate.supported()) return candidate.name;
  }
  return "scalar";
}

}  // namespace gossamer
