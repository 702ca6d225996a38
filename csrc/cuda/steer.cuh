// h = s + sum_j phi_j(v_j . s) u_j with s = x + residual, the norm of h, and the adjoints of both.
//
//   add           out = h
//   norm          out = h, normed = h (weight + offset) / sqrt(mean(h^2) + eps)
//   norm adjoint  d = gradient of normed, w = weight + offset, scale = 1 / sqrt(mean(h^2) + eps):
//                 g = scale (w d - h scale^2 mean(w d h)) + gradient of h,
//                 out = g + sum_j phi_j'(v_j . s) (u_j . g) v_j
//
// A row is read once. Each thread keeps its part of s in registers, as float32, or as float64 if
// the rows are float32 (see WideOf). The dot products are one reduction over the row's threads,
// then the result is written. That moves 3 bytes per byte of x (4 with the norm), as the residual
// add alone would, except for the normed row.
//
// With many rows, speed depends on how many bytes are on the way at once, so registers are for
// rows. The vectors and the weight, which earlier rows have left in L1, are loaded where they are
// used, the write vector even twice. With few rows (a split plan), speed depends on how often one
// load waits for another, so everything is loaded at the start.
//
// The norm needs no second reduction: |h|^2 follows from dot products with s, unless most of s is
// removed (see cancellation.h); the whole row takes the same branch.
#pragma once

#include "../cancellation.h"
#include "program.cuh"
#include "slice.cuh"

namespace rk::cuda {

enum class Mode { add, norm, norm_adjoint };  // see SteerArgs

// |h|^2 is derived if it is above this share of |s|^2, else summed.
template <class T, class Wide>
constexpr auto kTrustedShare = static_cast<float>(sizeof(Wide) == 8 ? cancellation::kDoubleSums
                                                  : T::kPack == 4 ? cancellation::kFloatRowsCuda
                                                                  : cancellation::kSixteenBitRows);

// The squares of h as derived from sums over s, and the value above which they are trusted.
template <class Wide>
struct DerivedSquares {
  Wide threshold = 0, value = 0;
};

// What a row needs beside itself, the part of one thread.
template <class RowSlice>
struct Operands {
  float read[RowSlice::kValues], write[RowSlice::kValues], gain[RowSlice::kValues];
  Phi phi;
};

// Loads the operands of a row with one slot before its first reduction.
template <Mode kMode, class RowSlice>
RK_DEVICE void load_operands(const SteerArgs& args, const RowSlice& slice,
                             const RowProgram& program, Operands<RowSlice>& operands) {
  if (program.index >= 0) {
    slice.read_vector(program.read, operands.read);
    slice.read_vector(program.write, operands.write);
    operands.phi = program.phis[0];
  }
  // last, because the type of the weight is a branch, and a load within it is waited for there
  if (kMode == Mode::norm) slice.read_gain(args.weight, operands.gain);
}

// The norm's adjoint: s is d, the gradient of normed, and becomes
// scale (w d - h scale^2 mean(w d h)).
template <class RowSlice, class Sum>
RK_DEVICE void apply_norm_adjoint(const SteerArgs& args, const RowSlice& slice,
                                  const typename RowSlice::Raw& raw_h, Sum& team_sum, float* gain,
                                  float* s) {
  using Wide = typename RowSlice::Wide;
  float h[RowSlice::kValues];
  RowSlice::unpack(raw_h, h);
  slice.read_gain(args.weight, gain);
#pragma unroll
  for (int i = 0; i < RowSlice::kValues; i++) s[i] *= gain[i];
  Wide sums[2] = {RowSlice::dot(h, h), RowSlice::dot(s, h)};
  team_sum(sums);
  const float scale = rsqrtf(static_cast<float>(sums[0] / slice.hidden) + args.weight.eps);
  const float share_of_h = scale * scale * static_cast<float>(sums[1] / slice.hidden);
#pragma unroll
  for (int i = 0; i < RowSlice::kValues; i++) s[i] = scale * fmaf(-share_of_h, h[i], s[i]);
}

// change += sum_j phi_j(v_j . s) u_j; kSlotsAtOnce dot products share a reduction.
template <int kSlotsAtOnce, class RowSlice, class Kept, class Sum>
RK_DEVICE void add_changes(const SteerArgs& args, const RowSlice& slice, int64_t row, int64_t slots,
                           const RowProgram& program, Sum& team_sum, float* vector, float* scores,
                           Kept* s, typename RowSlice::Wide* change) {
  using Wide = typename RowSlice::Wide;
  const int hidden = slice.hidden;
  for (int64_t first = 0; first < slots; first += kSlotsAtOnce) {
    Wide sums[kSlotsAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kSlotsAtOnce; k++) {
      if (first + k >= slots) break;
      slice.read_vector(program.read + (first + k) * hidden, vector);
      sums[k] = RowSlice::dot(s, vector);
    }
    team_sum(sums);
#pragma unroll
    for (int k = 0; k < kSlotsAtOnce; k++) {
      const int64_t slot = first + k;
      if (slot >= slots) break;
      if (scores) scores[slot] = static_cast<float>(sums[k]);
      const Wide phi = coefficient(args, row * slots + slot, program.phis[slot], sums[k]);
      slice.read_vector(program.write + slot * hidden, vector);
#pragma unroll
      for (int i = 0; i < RowSlice::kValues; i++)
        change[i] = multiply_add(phi, Wide{vector[i]}, change[i]);
    }
  }
}

// normed = rms_norm(s), where s holds the edited row.
template <bool kMayDerive, bool kGainLoaded, class RowSlice, class Kept, class Sum>
RK_DEVICE void write_normed(const SteerArgs& args, const RowSlice& slice, int64_t row,
                            Sum& team_sum, const DerivedSquares<typename RowSlice::Wide>& derived,
                            float* gain, Kept* s) {
  using Wide = typename RowSlice::Wide;
  Wide squares = derived.value;
  if (!kMayDerive || !(squares > derived.threshold)) {  // also if it is NaN
    Wide sums[1] = {RowSlice::dot(s, s)};
    team_sum(sums);
    squares = sums[0];
  }
  const float scale = rsqrtf(static_cast<float>(squares / slice.hidden) + args.weight.eps);
#pragma unroll
  for (int i = 0; i < RowSlice::kValues; i++) s[i] *= scale;
  if (!kGainLoaded) slice.read_gain(args.weight, gain);
#pragma unroll
  for (int i = 0; i < RowSlice::kValues; i++) s[i] *= gain[i];
  slice.write(args.normed, row, s);
}

// One row, whose x is in raw_x, and whose residual is in raw_residual unless kDelayResidual.
// kSlotsAtOnce slots share a reduction: 1 for the usual single direction, else 4 (2 for float32).
//
// The edit of one slot is not a function of its own because that moves registers in some kernels.
template <class T, Mode kMode, int kSlotsAtOnce, bool kDelayResidual, class RowSlice, class Sum>
RK_DEVICE void steer_row(const SteerArgs& args, const RowSlice slice, int64_t row, Sum& team_sum,
                         typename RowSlice::Raw& raw_x, typename RowSlice::Raw& raw_residual) {
  using Wide = typename RowSlice::Wide;
  constexpr bool kOneSlot = kSlotsAtOnce == 1, kAdjoint = kMode == Mode::norm_adjoint;
  constexpr bool kLoadOperandsFirst = kOneSlot && RowSlice::kValues <= 8 && T::kPack == 8;
  const int64_t slots = args.programs.slots;
  typename RowSlice::Raw raw_h;
  if constexpr (kAdjoint) slice.fetch(args.h, row, raw_h);
  const RowProgram program = row_program(args, row, slots, slice.hidden);
  Operands<RowSlice> operands;
  if constexpr (kLoadOperandsFirst) load_operands<kMode>(args, slice, program, operands);

  using Kept = std::conditional_t<kAdjoint, float, Wide>;  // registers are for h then
  Kept s[RowSlice::kValues];
  RowSlice::unpack(raw_x, s);
  if constexpr (kAdjoint) apply_norm_adjoint(args, slice, raw_h, team_sum, operands.gain, s);
  if (args.residual.data) {
    if (kDelayResidual) slice.fetch(args.residual, row, raw_residual);
    float residual[RowSlice::kValues];
    RowSlice::unpack(raw_residual, residual);
#pragma unroll
    for (int i = 0; i < RowSlice::kValues; i++) s[i] += residual[i];
  }

  float* scores = args.scores && slice.lane == 0 ? args.scores + row * slots : nullptr;
  DerivedSquares<Wide> squares;
  if (program.index < 0) {  // the plain add, bit for bit
    if (scores)
#pragma unroll 1
      for (int64_t slot = 0; slot < slots; slot++) scores[slot] = 0.0f;
  } else if constexpr (kOneSlot) {
    auto& [read, write, gain, loaded_phi] = operands;
    if (!kLoadOperandsFirst) slice.read_vector(program.read, read);
    Wide amount;  // of the write vector
    const Phi& phi = kLoadOperandsFirst ? loaded_phi : program.phis[0];
    if constexpr (kMode == Mode::norm) {  // |h|^2 comes from the same reduction
      if (!kLoadOperandsFirst) slice.read_vector(program.write, write);
      Wide sums[4] = {RowSlice::dot(s, read), RowSlice::dot(s, s), RowSlice::dot(s, write),
                      RowSlice::dot(write, write)};
      team_sum(sums);
      if (scores) scores[0] = static_cast<float>(sums[0]);
      amount = coefficient(args, row, phi, sums[0]);
      squares.value = multiply_add(amount, multiply_add(amount, sums[3], 2 * sums[2]), sums[1]);
      squares.threshold = kTrustedShare<T, Wide> * sums[1];
    } else {
      Wide sums[1] = {RowSlice::dot(s, read)};
      team_sum(sums);
      if (scores) scores[0] = static_cast<float>(sums[0]);
      amount = coefficient(args, row, phi, sums[0]);
    }
    if (!kLoadOperandsFirst) slice.read_vector(program.write, write);
#pragma unroll
    for (int i = 0; i < RowSlice::kValues; i++)
      s[i] = static_cast<Kept>(multiply_add(amount, Wide{write[i]}, Wide{s[i]}));
  } else {
    Wide change[RowSlice::kValues] = {};
    add_changes<kSlotsAtOnce>(args, slice, row, slots, program, team_sum, operands.read, scores, s,
                              change);
#pragma unroll
    for (int i = 0; i < RowSlice::kValues; i++) s[i] = static_cast<Kept>(s[i] + change[i]);
  }
  if (args.out.data) slice.write(args.out, row, s);
  if constexpr (kMode == Mode::norm)
    write_normed<kOneSlot, kLoadOperandsFirst>(args, slice, row, team_sum, squares, operands.gain,
                                               s);
}

}  // namespace rk::cuda
