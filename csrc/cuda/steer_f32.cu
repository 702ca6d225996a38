#include "steer_launch.cuh"

template void rk::cuda::launch_steer<rk::cuda::F32>(const char*, int32_t, const SteerArgs&,
                                                    int64_t);
