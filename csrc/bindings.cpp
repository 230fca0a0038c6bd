#include <c10/macros/Macros.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "covariance.h"
#include "linear.h"
#include "null_space.h"

namespace {

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

// Subclasses may mean something else by their products.
template <typename... Handles>
bool plain(const Handles&... handles) {
  return (THPVariable_CheckExact(handles.ptr()) && ...);
}

std::optional<lora_null::LinearCall> linear_call(py::handle x, py::handle weight, py::handle factor, py::handle lora_B,
                                                 py::handle bias, py::handle mixing, double scaling) {
  lora_null::OptionalTensor optional[2];
  const py::handle handles[2] = {bias, mixing};
  for (int i = 0; i < 2; ++i) {
    if (handles[i].is_none()) continue;
    if (!plain(handles[i])) return std::nullopt;
    optional[i] = THPVariable_Unpack(handles[i].ptr());
  }
  if (!plain(x, weight, factor, lora_B)) return std::nullopt;
  return lora_null::LinearCall{THPVariable_Unpack(x.ptr()),
                               THPVariable_Unpack(weight.ptr()),
                               THPVariable_Unpack(factor.ptr()),
                               THPVariable_Unpack(lora_B.ptr()),
                               optional[0],
                               optional[1],
                               scaling};
}

// Why Python has to do a call, or None.
std::optional<std::string> reason_against(py::handle x, py::handle weight, py::handle factor, py::handle lora_B,
                                          py::handle bias, py::handle mixing, bool projected) {
  const auto call = linear_call(x, weight, factor, lora_B, bias, mixing, 1);
  const char* reason = call.has_value() ? lora_null::reason_against(*call, projected) : "a tensor is of a subclass";
  return reason == nullptr ? std::nullopt : std::optional<std::string>(reason);
}

// y, or (y, S) with the projection, or None where Python has to do the call, or to say what is wrong with it.
template <bool projection>
py::object lora_linear(py::handle x, py::handle weight, py::handle lora_A, py::handle lora_B, py::handle bias,
                       py::handle mixing, double scaling) {
  auto call = linear_call(x, weight, lora_A, lora_B, bias, mixing, scaling);
  if (!call.has_value() || lora_null::reason_against(*call, false) != nullptr) return py::none();
  std::pair<at::Tensor, at::Tensor> outputs;
  {
    py::gil_scoped_release release;
    outputs = lora_null::lora_linear(lora_null::computed(std::move(*call), false), projection);
  }
  if constexpr (!projection) return py::cast(outputs.first);
  return py::make_tuple(outputs.first, outputs.second);
}

// y, or None likewise.
py::object lora_up_linear(py::handle x, py::handle weight, py::handle projected, py::handle lora_B, py::handle bias,
                          py::handle mixing, double scaling) {
  auto call = linear_call(x, weight, projected, lora_B, bias, mixing, scaling);
  if (!call.has_value() || lora_null::reason_against(*call, true) != nullptr) return py::none();
  at::Tensor y;
  {
    py::gil_scoped_release release;
    y = lora_null::lora_up_linear(lora_null::computed(std::move(*call), true));
  }
  return py::cast(y);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled part of lora_null; use lora_null.null_space and lora_null.ops.";
  module.def("filtered", &filtered, py::arg("C"), py::arg("r"), py::arg("tol"), py::arg("oversample"),
             py::arg("max_cycles"), py::arg("seed"), py::arg("patient"));
  module.def("covariance_update", &lora_null::covariance_update, py::arg("C"), py::arg("x"),
             py::call_guard<py::gil_scoped_release>());
  module.attr("sources") = C10_STRINGIZE(LORA_NULL_SOURCES);
  module.def("reason_against", &reason_against);
  // Wrapped, errors keep their types: torch.OutOfMemoryError, or that of a Python hook on saved tensors.
  module.def("lora_linear", torch::wrap_pybind_function(&lora_linear<false>));
  module.def("lora_linear_and_projection", torch::wrap_pybind_function(&lora_linear<true>));
  module.def("lora_up_linear", torch::wrap_pybind_function(&lora_up_linear));
}
