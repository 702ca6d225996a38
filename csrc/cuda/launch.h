// What the launchers need of CUDA and of torch: a stream, the right device, a launch that overlaps.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>

#include "../tensors.h"
#ifndef RK_CUDA_EMULATED
#include <torch/csrc/stable/accelerator.h>
#endif

namespace rk::cuda {

#ifdef RK_CUDA_EMULATED
struct OnDevice {
  explicit OnDevice(int32_t) {}
};
inline cudaStream_t stream_of(int32_t) {
  return nullptr;
}
#else
using OnDevice = torch::stable::accelerator::DeviceGuard;  // kernels start on the current device
inline cudaStream_t stream_of(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

inline void check(const char* op, cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
}

// Programmatic dependent launch: from sm_90 on, unless REFUSAL_KERNELS_PDL=0.
inline bool overlaps(const char* op, int32_t device) {
  static const bool wanted = [] {
    const char* value = std::getenv("REFUSAL_KERNELS_PDL");
    return !value || std::string(value) != "0";
  }();
  int major = 0;
  check(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return wanted && major >= 9;
}

template <class... Parameters, class... Arguments>
void launch(const char* op, int32_t device, void (*kernel)(Parameters...), int64_t blocks,
            int threads, int64_t shared_bytes, Arguments... arguments) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, op, ": ", blocks, " blocks are more than one launch takes");
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream_of(device);
  config.attrs = &overlap;
  config.numAttrs = overlaps(op, device) ? 1 : 0;
  check(op, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

inline int multiprocessors(const char* op, int32_t device) {
  int count = 0;
  check(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// More dynamic shared memory than 48 KB is given only to who asks for it.
template <class Kernel>
void allow_shared(const char* op, Kernel kernel, int64_t bytes) {
  if (bytes > 48 << 10)
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)));
}

inline bool aligned_rows(const Rows& rows, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride * element_size % 16 == 0;
}

inline bool aligned_pointer(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

}  // namespace rk::cuda
