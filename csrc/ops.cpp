// The ops' registration: what PyTorch calls.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(refusal_kernels, m) {
  rk::define_schemas(m);
}
