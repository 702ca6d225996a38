// Launches the steering kernels. Each element type has a translation unit of its own, since there
// are dozens of kernels for each.
#pragma once

#include "../args.h"

namespace rk::cuda {

template <class T>
void launch_steer(const char* op, int32_t device, const SteerArgs& args, int64_t tokens);

}  // namespace rk::cuda
