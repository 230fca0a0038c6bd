#include <torch/csrc/utils/pybind.h>

#include "covariance.h"
#include "linear.h"
#include "null_space.h"

namespace {

py::tuple exact(const at::Tensor& C, int64_t r) {
  lora_null::Eigenpairs pairs;
  {
    py::gil_scoped_release release;
    pairs = lora_null::exact(C, r);
  }
  return py::make_tuple(pairs.basis, pairs.values);
}

py::tuple filtered(const at::Tensor& C, int64_t r, double tol, int64_t oversample, int64_t max_cycles, int64_t seed,
                   bool patient) {
  lora_null::FilterResult result;
  {
    py::gil_scoped_release release;
    result = lora_null::filtered(C, r, {tol, oversample, max_cycles, seed, patient});
  }
  py::dict seconds, info;
  seconds["factor"] = result.factor_seconds;
  seconds["iterate"] = result.iterate_seconds;
  seconds["test"] = result.test_seconds;
  seconds["finish"] = result.finish_seconds;
  info["shift"] = result.shift;
  info["attempts"] = result.attempts;
  info["cycles"] = result.cycles;
  info["columns"] = result.columns;
  info["residual"] = result.residual;
  info["reason"] = result.reason;
  info["seconds"] = seconds;
  if (!result.basis.defined()) return py::make_tuple(py::none(), py::none(), info);
  return py::make_tuple(result.basis, result.values, info);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled part of lora_null; use lora_null.null_space and lora_null.ops.";
  module.def("exact", &exact, py::arg("C"), py::arg("r"));
  module.def("filtered", &filtered, py::arg("C"), py::arg("r"), py::arg("tol"), py::arg("oversample"),
             py::arg("max_cycles"), py::arg("seed"), py::arg("patient"));
  module.def("covariance_update", &lora_null::covariance_update, py::arg("C"), py::arg("x"),
             py::call_guard<py::gil_scoped_release>());
  module.def("multiplies_bf16", &lora_null::multiplies_bf16);
  module.def("lora_linear", &lora_null::lora_linear, py::call_guard<py::gil_scoped_release>());
  module.def("lora_up_linear", &lora_null::lora_up_linear, py::call_guard<py::gil_scoped_release>());
}
