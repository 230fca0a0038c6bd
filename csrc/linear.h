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

// The arguments of an adapted linear.
//   x: (..., d), weight: (m, d), factor: lora_A (p, d) or a projection P (..., p), lora_B: (m, r), bias: (m).
//   mixing: M (r, p), a constant; the identity where there is none.
struct LinearCall {
  at::Tensor x, weight, factor, lora_B;
  OptionalTensor bias, mixing;
  double scaling;
};

// Say whether the functions below can take this call, and cast its tensors as autocast would. Left to Python are
// weights that require a gradient, tensors that are not plain dense ones of one device, shapes that do not fit, a
// backend that the environment asks for, any kind of tracing, and on a GPU more than max_products = T d m.
bool takes(LinearCall& call, bool projected, double max_products);

// Return y = x W^T + scaling S (B M)^T + bias (..., m) and S = x A^T (..., p), both differentiable once; S only
// where x or A requires a gradient.
std::pair<at::Tensor, at::Tensor> lora_linear(const LinearCall& call);

// Return y = x W^T + scaling P (B M)^T + bias (..., m).
at::Tensor lora_up_linear(const LinearCall& call);

}  // namespace lora_null
