#include "steer_launch.cuh"

template void rk::cuda::launch_steer<rk::cuda::BF16>(const char*, int32_t, const SteerArgs&,
                                                     int64_t);
