// The adapted linear on the vendor's GEMMs, forward and backward without Python between the products.
//
// The same products in the same order as lora_null/ops/vendor.py, so with the same bits; what goes away is the time of
// the interpreter, which exceeds that of the products where there are few tokens or the GPU is fast.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>

namespace lora_null {

using OptionalTensor = std::optional<at::Tensor>;

// Return y = x W^T + scaling S (B M)^T + bias (..., m) and S = x A^T (..., p), both differentiable once.
//   x: (..., d), weight: (m, d) that requires no gradient, lora_A: (p, d), lora_B: (m, r), bias: (m).
//   mixing: M (r, p), a constant; the identity where there is none.
std::pair<at::Tensor, at::Tensor> lora_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A,
                                              const at::Tensor& lora_B, const OptionalTensor& bias,
                                              const OptionalTensor& mixing, double scaling);

// Return y = x W^T + scaling P (B M)^T + bias (..., m) for a projection P (..., p) made elsewhere.
at::Tensor lora_up_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& projected,
                          const at::Tensor& lora_B, const OptionalTensor& bias, const OptionalTensor& mixing,
                          double scaling);

}  // namespace lora_null
