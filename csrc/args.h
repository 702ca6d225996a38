// What the kernels take: plain pointers and numbers, the same on every device.
#pragma once

#include <cstdint>

namespace rk {

enum class Dtype : int32_t { f32, bf16, f16 };

// A tensor seen as rows of `hidden` contiguous elements; the stride is counted in elements.
struct Rows {
  void* data = nullptr;  // null: the tensor is absent
  int64_t stride = 0;
};

// phi(t) = slope t + clamped_slope clamp(t, low, high) + constant: how much of its write vector a
// slot adds for the dot product t of its read vector. It is a row of the ops' argument `params`,
// whose columns are called a, c, b, low and high in Python.
struct Phi {
  float slope, clamped_slope, constant, low, high;
};
constexpr int64_t kPhiNumbers = 5;
static_assert(sizeof(Phi) == kPhiNumbers * sizeof(float), "a row of params is read as a Phi");

// One steering program for each row: h = s + sum_j phi_j(v_j . s) u_j
struct Programs {
  const float* bank;     // [count, 2, slots, hidden]: read vectors v, write vectors u
  const Phi* phis;       // [count, slots]
  const int32_t* route;  // [tokens] or null (program 0 everywhere); -1: the plain add
  int64_t count, slots;
};

// The weight of an RMSNorm: the row is multiplied by weight + offset.
struct Weight {
  const void* data = nullptr;  // [hidden]; null: no norm
  Dtype dtype = Dtype::f32;
  float offset = 0.0f;
  float eps = 0.0f;
};

// Three computations in one shape, because they share nearly all of their work:
//
//   add           out = edit(x + residual), and with a weight also normed = rms_norm(out)
//   adjoint       (saved given) out = the gradient of s, from x = the gradient of h
//   norm adjoint  (saved and h given) the same through the norm, from x = the gradient of normed
//                 and residual = the gradient of h
struct SteerArgs {
  Rows x, residual, out;  // residual may be absent; out may be x or residual
  Programs programs;
  int64_t hidden;
  Weight weight;
  Rows normed = {};
  float* scores = nullptr;       // [tokens, slots]: v_j . s, if the caller wants them
  const float* saved = nullptr;  // [tokens, slots]: the scores of the forward pass
  Rows h = {};                   // the steered rows of the forward pass
  bool may_stream = false;       // outputs that exceed the CPU's caches may be written past them
};

struct ScoresArgs {
  Rows h;
  Programs programs;
  float* out;  // [tokens, slots]
  int64_t hidden;
};

struct RmsNormArgs {
  Rows x, out;
  Weight weight;
  int64_t hidden;
};

// Running moments of groups x positions slots, and the batch that is folded into them.
struct MomentsArgs {
  int64_t* count;     // [groups, positions]
  double *mean, *m2;  // [groups, positions, hidden]
  const void* activations;
  int64_t batch_stride, token_stride;  // in elements; channels are contiguous
  const int32_t* index;                // [batch, tokens]: position or -1
  const int32_t* group;                // [batch]: group or -1
  int64_t groups, positions, batch, tokens, hidden;
};

}  // namespace rk
