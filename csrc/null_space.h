// r smallest eigenpairs of a dense covariance, on ATen: one implementation for CPU and CUDA tensors.
//
// Alphabet: d in-features, r rank. C (d, d) is symmetric positive semidefinite up to rounding.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace lora_null {

struct NullSpace {
  at::Tensor basis;        // (d, r) float64, orthonormal columns
  at::Tensor eigenvalues;  // (r,) float64, ascending
};

// Full symmetric eigensolver. C (d, d) float64, lower triangle read.
NullSpace exact(const at::Tensor& C, int64_t r);

}  // namespace lora_null
