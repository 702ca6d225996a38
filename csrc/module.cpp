// The extension module `_C`, which never takes a tensor: what Python asks about the build.

// Not bound to the stable ABI: PyTorch's own copy of pybind11 refuses to be included with it.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/rows.h"
#include "cuda/plans.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled kernels of refusal_kernels: importing it registers torch.ops.refusal_kernels.*";
  m.def(
      "cpu_capability", [] { return rk::kernels().name; },
      "The instruction set of the CPU kernels: avx512_bf16, avx512, avx2 or baseline.");
  m.def("cpu_capabilities", &rk::capabilities,
        "The instruction sets that this processor runs, of those compiled in, best first.");
  m.def("cpu_cache_share", &rk::cache_share,
        "Bytes: a task that moves as many writes its outputs past the caches.");
  m.def(
      "cuda_architectures", [] { return std::string(RK_CUDA_ARCHITECTURES); },
      "What the CUDA kernels were compiled for, as nvcc was told; empty in a build without them.");
  m.def(
      "cuda_launch_plans",
      [] {
        py::list plans;
        for (const auto& plan : rk::cuda::kPlans) {
          py::dict entry;
          entry["hidden"] = plan.hidden();
          entry["threads_per_row"] = plan.threads();
          entry["rows_per_block"] = plan.rows;
          entry["blocks_per_row"] = plan.cluster;
          if (plan.max_tokens != rk::cuda::kAnyTokens) entry["max_tokens"] = plan.max_tokens;
          plans.append(entry);
        }
        return plans;
      },
      "The launch plans of the CUDA steering kernels, in the order in which they are tried.");
  m.def(
      "build_summary",
      [] {
        const std::string cuda = RK_CUDA_ARCHITECTURES;
        return std::string("CPU kernels (") + rk::kernels().name + " on this machine), " +
               (cuda.empty() ? "no CUDA kernels" : "CUDA kernels (" + cuda + ")") + ", compiler " +
               __VERSION__ + ", torch " + RK_TORCH_TARGET + " or later";
      },
      "How the extension was built, in one line.");
}
