// The schemas of the ops. The tests define them a second time, in the namespace of the CUDA kernels
// that they run on a CPU.
#pragma once

namespace rk {

template <class Library>
void define_schemas(Library& m) {
  m.def(
      "add_steer(Tensor x, Tensor? residual, Tensor bank, Tensor params, Tensor? route=None) -> "
      "Tensor");
  m.def(  // the same kernel without a gradient: see refusal_kernels/ops/autograd.py
      "add_steer_inference(Tensor x, Tensor? residual, Tensor bank, Tensor params, Tensor? "
      "route=None) "
      "-> Tensor");
  m.def(  // and what the edit read: v_j . s, before the edit
      "add_steer_scores(Tensor x, Tensor? residual, Tensor bank, Tensor params, Tensor? "
      "route=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "add_steer_backward(Tensor grad, Tensor scores, Tensor bank, Tensor params, Tensor? "
      "route=None) -> Tensor");
  m.def(
      "add_steer_(Tensor x, Tensor(a!) residual, Tensor bank, Tensor params, Tensor? route=None) "
      "-> ()");
  m.def(
      "add_steer_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor bank, "
      "Tensor params, Tensor? route=None, float weight_offset=0.0) -> (Tensor, Tensor)");
  m.def(
      "add_steer_rms_norm_inference(Tensor x, Tensor? residual, Tensor weight, float eps, "
      "Tensor bank, Tensor params, Tensor? route=None, float weight_offset=0.0) "
      "-> (Tensor, Tensor)");
  m.def(
      "add_steer_rms_norm_scores(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor "
      "bank, "
      "Tensor params, Tensor? route=None, float weight_offset=0.0) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_steer_rms_norm_backward(Tensor grad_normed, Tensor? grad_h, Tensor h, Tensor scores, "
      "Tensor weight, float eps, Tensor bank, Tensor params, Tensor? route=None, "
      "float weight_offset=0.0) -> Tensor");
  m.def("scores(Tensor h, Tensor bank, Tensor? route=None) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset=0.0) -> Tensor");
  m.def(
      "moments_(Tensor(a!) count, Tensor(b!) mean, Tensor(c!) m2, Tensor activations, Tensor "
      "index, "
      "Tensor group) -> ()");
}

}  // namespace rk
