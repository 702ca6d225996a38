// The schemas of the ops in a namespace of their own, for the CUDA kernels that run on the CPU.
#include "../../../csrc/schemas.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(RK_CUDA_EMULATED, m) {
  rk::define_schemas(m);
}
