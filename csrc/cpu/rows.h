// The CPU kernels' interface: plain pointers in, so that the row kernels know nothing of torch.
#pragma once

#include <cstdint>

namespace rk {

enum class Dtype { f32, bf16, f16 };

// A tensor seen as rows of `hidden` contiguous elements; the stride is counted in elements.
struct Rows {
  void* data = nullptr;  // null: the tensor is absent
  int64_t stride = 0;
};

// One steering program for each row: h = s + sum_j phi_j(v_j . s) u_j
struct Programs {
  const float* bank;     // [programs, 2, slots, hidden]: read vectors v, write vectors u
  const float* params;   // [programs, slots, 5]: a, c, b, low, high
  const int32_t* route;  // [tokens] or null (program 0 everywhere); -1: the plain add
  int64_t slots;
};

struct SteerArgs {
  Rows x, residual, out;  // residual may be absent; out may be x or residual
  Programs programs;
  int64_t hidden;
  // with RMSNorm: where the normed rows go (absent: no norm), weight + weight_offset, and eps
  Rows normed = {};
  const float* gain = nullptr;  // [hidden]
  float eps = 0.0f;
};

struct ScoresArgs {
  Rows h;
  Programs programs;
  float* out;  // [tokens, slots]
  int64_t hidden;
};

struct RmsNormArgs {
  Rows x, out;
  const float* gain;  // [hidden]: weight + weight_offset
  float eps;
  int64_t hidden;
};

// One group-and-position slot of the streaming moments, channels [begin, end) of it.
struct MomentsArgs {
  const void* activations;
  const int64_t* rows;  // element offsets of the rows that feed this slot, in order
  int64_t n;            // how many, > 0
  int64_t count;        // rows seen before
  double *mean, *m2;    // [hidden]
};

struct Kernels {
  const char* name;
  void (*steer)(Dtype, const SteerArgs&, int64_t begin, int64_t end, float* scratch);
  void (*scores)(Dtype, const ScoresArgs&, int64_t begin, int64_t end);
  void (*rms_norm)(Dtype, const RmsNormArgs&, int64_t begin, int64_t end);
  void (*moments)(Dtype, const MomentsArgs&, int64_t begin, int64_t end);
  void (*to_float)(Dtype, const void* from, float* to, int64_t n);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The best of them that this processor runs, or the one REFUSAL_KERNELS_CPU_CAPABILITY names.
const Kernels& kernels();

}  // namespace rk
