// When a fused norm may derive |h|^2 instead of summing it: one threshold per precision.
//
// With h = s + phi u,
//     |h|^2 = s.s + 2 phi s.u + phi^2 u.u,
// so the norm needs no second pass over the row: all dot products come from one reduction. Where
// the edit removes most of s the terms cancel, and what remains is the rounding error of the sums,
// magnified by |s|^2 / |h|^2. If |h|^2 is below the share of |s|^2 given here, the squares of h are
// summed instead. The shares keep the error of the normed row at or below that of eager PyTorch in
// the same dtype, which tests/ops/test_accuracy.py checks on each device.
#pragma once

namespace rk::cancellation {

// 16-bit rows, float32 sums (CPU and CUDA): errors grow at most a hundredfold, to about 1e-5, which
// is far below the rounding of h to 8 or 11 bits.
constexpr double kSixteenBitRows = 0.01;

// float32 rows with float32 sums: h is rounded no more coarsely than the sums, so there is little
// room for growth. The CPU adds up blocks in float32 and the blocks in float64; CUDA adds up a tree
// of float32 (rows over 8,192 only). The two values were chosen apart, each for its order of sums.
constexpr double kFloatRowsCpu = 0.5;
constexpr double kFloatRowsCuda = 0.25;

// float32 rows with float64 sums (CUDA, rows up to 8,192): after a growth by a million the error is
// about 1e-10, below the rounding of h to 24 bits.
constexpr double kDoubleSums = 1e-6;

}  // namespace rk::cancellation
