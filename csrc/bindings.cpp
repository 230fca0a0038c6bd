#include <torch/csrc/utils/pybind.h>

#include "null_space.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled part of lora_null; use lora_null.null_space.";
  module.def(
      "exact",
      [](const at::Tensor& C, int64_t r) {
        auto result = lora_null::exact(C, r);
        return std::make_tuple(result.basis, result.eigenvalues);
      },
      py::arg("C"), py::arg("r"), py::call_guard<py::gil_scoped_release>());
}
