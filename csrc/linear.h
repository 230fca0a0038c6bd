// The adapted linear on the vendor's GEMMs, forward and backward without Python between the products.
//
// The same products in the same order as lora_null/ops/vendor.py, so with the same bits (but dx of layers that share a
// projection, a sum that autograd makes there); what goes away is the time of the interpreter, which exceeds that of
// the products where there are few tokens or the GPU is fast.
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

// Return why the functions below cannot take this call, or null if they can: what Python would not see as cheaply.
const char* reason_against(const LinearCall& call, bool projected);

// Return the call in the types that autocast computes in.
LinearCall computed(LinearCall call, bool projected);

// The rest is for calls in computed types, against which there is no reason.

// Return y = x W^T + scaling S (B M)^T + bias (..., m) and, with `projection`, S = x A^T (..., p), both differentiable
// once; S only where x or A requires a gradient.
std::pair<at::Tensor, at::Tensor> lora_linear(const LinearCall& call, bool projection);

// Return y = x W^T + scaling P (B M)^T + bias (..., m).
at::Tensor lora_up_linear(const LinearCall& call);

}  // namespace lora_null
