// Everything that depends on who runs the CUDA sources: a GPU (and which), the host's side of nvcc,
// or the emulator of the tests, which runs the kernels on a CPU. No other file asks.
//
// RK_CUDA_EMULATED is defined for the emulator; its value is the namespace of the emulated ops.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#ifndef RK_CUDA_EMULATED
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#define RK_DEVICE __device__ __forceinline__

// Machine instructions; none where the host compiles, and in the second form none before sm_90.
#if defined(__CUDA_ARCH__)
#define RK_PTX(...) asm volatile(__VA_ARGS__)
#else
#define RK_PTX(...)
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define RK_PTX_SM90(...) asm volatile(__VA_ARGS__)
#else
#define RK_PTX_SM90(...)
#endif

namespace rk::cuda {

// --- the host's side -----------------------------------------------------------------------------

#ifdef RK_CUDA_EMULATED
#define RK_CUDA_NAMESPACE RK_CUDA_EMULATED
#define RK_CUDA_DISPATCH_KEY CPU
constexpr bool kBlocksRunTogether = false;  // one after the other, so no clusters
struct OnDevice {
  explicit OnDevice(int32_t) {}
};
inline cudaStream_t stream_of(int32_t) {
  return nullptr;
}
#else
#define RK_CUDA_NAMESPACE refusal_kernels
#define RK_CUDA_DISPATCH_KEY CUDA
constexpr bool kBlocksRunTogether = true;
using OnDevice = torch::stable::accelerator::DeviceGuard;  // kernels start on the current device
inline cudaStream_t stream_of(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

// --- shared memory -------------------------------------------------------------------------------

RK_DEVICE void* dynamic_shared() {
#ifdef RK_CUDA_EMULATED
  return emulated_dynamic_shared();
#else
  extern __shared__ uint4 memory[];
  return memory;
#endif
}

// Starts to copy 16 bytes into shared memory, zeros if not `inside`; see wait_for_copies().
RK_DEVICE void start_copy(uint4* to, const void* from, bool inside) {
#if defined(__CUDA_ARCH__)
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  RK_PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from),
         "r"(inside ? 16 : 0) : "memory");
#else
  *to = inside ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#endif
}

RK_DEVICE void wait_for_copies() {
  RK_PTX("cp.async.wait_all;" :: : "memory");
}

// Whether a persistent block prefetches its next row into shared memory: before sm_90 ptxas finds
// no registers for that.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kPrefetchesNextRow = false;
#else
constexpr bool kPrefetchesNextRow = true;
#endif

// --- prefetches ----------------------------------------------------------------------------------

// Into L2 and no further: the previous kernel may still be writing it, and writes go to L2.
RK_DEVICE void prefetch(const void* p) {
  RK_PTX("prefetch.global.L2 [%0];" ::"l"(p));
}

// Arguments lie in constant memory, and the first use of each of its lines waits. Uses these now,
// so that the wait comes before the previous kernel has ended, not after.
RK_DEVICE void touch_arguments(const void* a, const void* b, const void* c, const void* d,
                               const void* e) {
  RK_PTX("" ::"l"(a), "l"(b), "l"(c), "l"(d), "l"(e));
}

// --- programmatic dependent launch: sm_90 and later, nothing before ------------------------------

// Everything the previous kernel has written is visible from here on.
RK_DEVICE void wait_for_previous_kernel() {
  RK_PTX_SM90("griddepcontrol.wait;" :: : "memory");
}

// The next kernel may start its prologue; it waits for the end of this one, and so for its writes.
RK_DEVICE void start_next_kernel() {
  RK_PTX_SM90("griddepcontrol.launch_dependents;" :: : "memory");
}

// --- clusters of blocks: sm_90 and later ---------------------------------------------------------

// With kRelease, what was stored before is seen by those who have waited.
template <bool kRelease>
RK_DEVICE void arrive_at_cluster() {
  if constexpr (kRelease) {
    RK_PTX_SM90("barrier.cluster.arrive.release.aligned;" :: : "memory");
  } else {
    RK_PTX_SM90("barrier.cluster.arrive.relaxed.aligned;" :: : "memory");
  }
}
RK_DEVICE void wait_for_cluster() {
  RK_PTX_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}

// Stores to the same place of another block's shared memory.
template <class Number>
RK_DEVICE void store_in_block(Number* place, int block, Number value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto here = static_cast<uint32_t>(__cvta_generic_to_shared(place));
  uint32_t there;
  RK_PTX_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
  if constexpr (sizeof(Number) == 8)
    RK_PTX_SM90("st.shared::cluster.f64 [%0], %1;" ::"r"(there), "d"(value) : "memory");
  else
    RK_PTX_SM90("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
#endif
}

}  // namespace rk::cuda
