// What this processor has: the instruction set that this process uses, and the size of its cache.
// Both are determined once, at the first call.
#include <cstdlib>
#include <cstring>
#include <fstream>
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
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"))
      all.push_back(&kernels_avx512_bf16);
    all.push_back(&kernels_avx512);
  }
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

// From Linux, which asks the processor; glibc's sysconf adds up all caches of an EPYC.
int64_t read_cache_share() {
  const std::string cache = "/sys/devices/system/cpu/cpu0/cache/index3/";
  std::ifstream size_file(cache + "size"), sharing_file(cache + "shared_cpu_map");
  int64_t kib = 0, sharing = 0;
  std::string mask;  // hexadecimal words with commas between
  if (size_file >> kib && sharing_file >> mask)
    for (const char digit : mask)
      sharing += __builtin_popcount(std::strtol(std::string(1, digit).c_str(), nullptr, 16));
  return kib > 0 && sharing > 0 ? (kib << 10) / sharing : 16 << 20;
}

}  // namespace

int64_t cache_share() {
  static const int64_t share = read_cache_share();
  return share;
}

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
