// The extension module `_C`: what Python asks about the build. It takes no tensors, and it is
// written in Python's own C API, because pybind11's headers take seven seconds to compile.
#include <Python.h>

#include <exception>
#include <string>

#include "cpu/rows.h"
#include "cuda/plans.h"

namespace {

PyObject* text(const std::string& value) {
  return PyUnicode_FromString(value.c_str());
}

// Appends an object that nobody else holds.
void append(PyObject* list, PyObject* item) {
  PyList_Append(list, item);
  Py_DECREF(item);
}

PyObject* cpu_capability() {
  return text(rk::kernels().name);
}

PyObject* cpu_capabilities() {
  PyObject* names = PyList_New(0);
  for (const std::string& name : rk::capabilities()) append(names, text(name));
  return names;
}

PyObject* cpu_cache_share() {
  return PyLong_FromLongLong(rk::cache_share());
}

PyObject* cuda_architectures() {
  return text(RK_CUDA_ARCHITECTURES);
}

PyObject* cuda_launch_plans() {
  PyObject* plans = PyList_New(0);
  for (const auto& plan : rk::cuda::kPlans) {
    PyObject* entry =
        Py_BuildValue("{s:i,s:i,s:i,s:i}", "hidden", plan.hidden(), "threads_per_row",
                      plan.threads(), "rows_per_block", plan.rows, "blocks_per_row", plan.cluster);
    if (plan.max_tokens != rk::cuda::kAnyTokens) {
      PyObject* max_tokens = PyLong_FromLongLong(plan.max_tokens);
      PyDict_SetItemString(entry, "max_tokens", max_tokens);
      Py_DECREF(max_tokens);
    }
    append(plans, entry);
  }
  return plans;
}

PyObject* build_summary() {
  const std::string cuda = RK_CUDA_ARCHITECTURES;
  return text(std::string("CPU kernels (") + rk::kernels().name + " on this machine), " +
              (cuda.empty() ? "no CUDA kernels" : "CUDA kernels (" + cuda + ")") + ", compiler " +
              __VERSION__ + ", torch " + RK_TORCH_TARGET + " or later");
}

// A function of the module: an exception of C++ becomes a RuntimeError.
template <PyObject* (*kFunction)()>
PyObject* call(PyObject*, PyObject*) {
  try {
    return kFunction();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef functions[] = {
    {"cpu_capability", call<cpu_capability>, METH_NOARGS,
     "The instruction set of the CPU kernels: avx512_bf16, avx512, avx2 or baseline."},
    {"cpu_capabilities", call<cpu_capabilities>, METH_NOARGS,
     "The instruction sets that this processor runs, of those compiled in, best first."},
    {"cpu_cache_share", call<cpu_cache_share>, METH_NOARGS,
     "Bytes: a task that moves as many writes its outputs past the caches."},
    {"cuda_architectures", call<cuda_architectures>, METH_NOARGS,
     "What the CUDA kernels were compiled for, as nvcc was told; empty in a build without them."},
    {"cuda_launch_plans", call<cuda_launch_plans>, METH_NOARGS,
     "The launch plans of the CUDA steering kernels, in the order in which they are tried."},
    {"build_summary", call<build_summary>, METH_NOARGS,
     "How the extension was built, in one line."},
    {},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Compiled kernels of refusal_kernels: importing it registers torch.ops.refusal_kernels.*",
    -1,
    functions,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
