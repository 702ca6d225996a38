// The program of a row: its vectors, and what their dot products with the row do.
#pragma once

#include "packed.cuh"

namespace rk::cuda {

// The number of a row's program, -1 for none. Out of range counts as none: a kernel cannot raise.
RK_DEVICE int64_t program_of(const Programs& programs, int64_t row) {
  const int64_t program = programs.route ? programs.route[row] : 0;
  return program < programs.count && programs.slots > 0 ? program : -1;
}

// The program of a row; its vectors are those of program 0 if the row is not edited, so that the
// pointers stay valid.
struct RowProgram {
  int64_t index;  // -1: the row is not edited
  const float *read, *write;
  const Phi* phis;
};

// `slots` and `hidden` are those of `args`, as the kernel has read them. `phis` comes before the
// swap because the order decides about registers.
RK_DEVICE RowProgram row_program(const SteerArgs& args, int64_t row, int64_t slots, int hidden) {
  const int64_t index = program_of(args.programs, row);
  const float* read = args.programs.bank + (index < 0 ? 0 : index) * 2 * slots * hidden;
  const float* write = read + slots * hidden;
  const Phi* phis = args.programs.phis + index * slots;
  if (args.saved) {  // the adjoint of an edit is the edit with read and write vectors swapped
    const float* swap = read;
    read = write, write = swap;
  }
  return {index, read, write, phis};
}

// phi(t), see Phi. A NaN score compares false twice and stays a NaN.
template <class Number>
RK_DEVICE Number phi_of(const Phi& phi, Number t) {
  Number clamped = t;
  if (t < phi.low) clamped = phi.low;
  if (clamped > phi.high) clamped = phi.high;
  return multiply_add(Number{phi.slope}, t,
                      multiply_add(Number{phi.clamped_slope}, clamped, Number{phi.constant}));
}

// How much of its write vector a slot adds for the dot product `dot` of its read vector: phi(dot),
// or, in the adjoint, dot times the slope of phi at the score saved at `at`.
template <class Number>
RK_DEVICE Number coefficient(const SteerArgs& args, int64_t at, const Phi& phi, Number dot) {
  if (!args.saved) return phi_of(phi, dot);
  const float t = args.saved[at];
  return (t < phi.low || t > phi.high ? phi.slope : phi.slope + phi.clamped_slope) * dot;
}

}  // namespace rk::cuda
