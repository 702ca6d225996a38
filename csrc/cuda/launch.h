// What the launchers need: questions to the device, and a launch that overlaps with the previous
// one.
#pragma once

#include <cstdlib>

#include "../tensors.h"
#include "platform.cuh"

namespace rk::cuda {

inline void check(const char* op, cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
}

inline int device_number(const char* op, int32_t device, cudaDeviceAttr attribute) {
  int number = 0;
  check(op, cudaDeviceGetAttribute(&number, attribute, device));
  return number;
}

// Programmatic dependent launch: from sm_90 on, unless REFUSAL_KERNELS_PDL=0.
inline bool overlaps(const char* op, int32_t device) {
  static const bool wanted = [] {
    const char* value = std::getenv("REFUSAL_KERNELS_PDL");
    return !value || std::string(value) != "0";
  }();
  return wanted && device_number(op, device, cudaDevAttrComputeCapabilityMajor) >= 9;
}

// Clusters of blocks: from sm_90 on.
inline bool has_clusters(const char* op, int32_t device) {
  return kBlocksRunTogether && device_number(op, device, cudaDevAttrComputeCapabilityMajor) >= 9;
}

// The shape of a launch; blocks of a cluster run at the same time.
struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;
};

template <class... Parameters, class... Arguments>
void launch(const char* op, int32_t device, void (*kernel)(Parameters...), const Grid& grid,
            Arguments... arguments) {
  STD_TORCH_CHECK(grid.blocks <= INT32_MAX, op, ": ", grid.blocks,
                  " blocks are more than one launch takes");
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream_of(device);
  config.attrs = attributes;
  if (overlaps(op, device)) {
    auto& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    auto& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
  check(op, cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// A kernel gets more than 48 KB of dynamic shared memory only if it is allowed to.
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
