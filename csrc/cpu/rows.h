// The CPU kernels' interface: a table of functions for each instruction set.
#pragma once

#include <string>
#include <vector>

#include "../args.h"
#include "../cancellation.h"

namespace rk {

// One group-and-position slot of the streaming moments.
struct SlotArgs {
  const void* activations;
  const int64_t* rows;  // element offsets of the rows that feed this slot, in order
  int64_t n;            // how many, > 0
  int64_t count;        // rows seen before
  double *mean, *m2;    // [hidden]
};

struct Kernels {
  const char* name;
  // rows [begin, end); scratch holds scratch_floats(...) floats
  void (*steer)(Dtype, const SteerArgs&, int64_t begin, int64_t end, float* scratch);
  void (*scores)(Dtype, const ScoresArgs&, int64_t begin, int64_t end);
  void (*rms_norm)(Dtype, const RmsNormArgs&, int64_t begin, int64_t end, float* scratch);
  void (*moments)(Dtype, const SlotArgs&, int64_t begin, int64_t end);  // channels [begin, end)
};

// What a thread needs beside its rows: a row in float32, the gain in float32, and a coefficient for
// every slot. One slot and a weight that is read in place need nothing.
inline int64_t scratch_floats(int64_t hidden, int64_t slots, bool widened) {
  return slots > 1 || widened ? 2 * hidden + slots : 0;
}

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif

// The best of them that this processor runs, or the one REFUSAL_KERNELS_CPU_CAPABILITY names.
const Kernels& kernels();

// The bytes of the last-level cache for one thread, if all threads that share it get as much.
int64_t cache_share();

// The names of all that this processor runs, best first.
std::vector<std::string> capabilities();

}  // namespace rk
