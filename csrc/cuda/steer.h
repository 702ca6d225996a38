// Launches of the steering kernels; one translation unit per element type, since each holds dozens.
#pragma once

#include "../args.h"

namespace rk::cuda {

template <class T>
void launch_steer(const char* op, int32_t device, const SteerArgs& args, int64_t tokens);

}  // namespace rk::cuda
