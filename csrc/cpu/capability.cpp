// Which of the compiled instruction sets this process uses: chosen once, at the first call.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "rows.h"

namespace rk {
namespace {

// The sets this processor runs, best first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    all.push_back(&kernels_avx512);
  // F16C has no name here; every processor with AVX2 and FMA has it
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(&kernels_avx2);
#endif
  all.push_back(&kernels_baseline);
  return all;
}

const Kernels& choose() {
  const auto all = supported();
  const char* wanted = std::getenv("REFUSAL_KERNELS_CPU_CAPABILITY");
  if (!wanted || !*wanted) return *all.front();
  std::string names;
  for (const Kernels* k : all) {
    if (std::strcmp(wanted, k->name) == 0) return *k;
    names += std::string(names.empty() ? "" : ", ") + k->name;
  }
  throw std::runtime_error("REFUSAL_KERNELS_CPU_CAPABILITY is '" + std::string(wanted) +
                           "'; this machine runs: " + names);
}

}  // namespace

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Kernels* k : supported()) names.push_back(k->name);
  return names;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace rk
