// r smallest eigenpairs of a dense covariance, on ATen: one implementation for CPU and CUDA tensors.
//
// Alphabet: d in-features, r rank. C (d, d) is float64, symmetric, positive semidefinite up to rounding.
// Vectors are stored as rows, V (b, d): a skinny product V C then has its long side where BLAS wants it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace lora_null {

struct FilterOptions {
  double tol;          // relative excess over the least possible energy
  int64_t oversample;  // Ritz vectors beyond r in the final Rayleigh-Ritz step
  int64_t max_cycles;  // Rayleigh-Ritz tests before the direct solver takes over
  int64_t seed;
  bool patient;  // false: give up as soon as max_cycles is clearly too few
};

struct FilterResult {
  at::Tensor basis;   // (d, r); undefined where the direct solver must take over, then `reason` says why
  at::Tensor values;  // (r + oversample,) ascending, on the host; those beyond r are upper bounds
  std::string reason;
  double shift = 0;      // of the factorisation, absolute
  int64_t attempts = 0;  // factorisations tried
  int64_t cycles = 0;
  int64_t columns = 0;  // dimension of the Krylov space
  double residual = 0;  // largest |C u - theta u|, relative to the Frobenius norm of C
  double factor_seconds = 0, iterate_seconds = 0, test_seconds = 0, finish_seconds = 0;
};

// One Cholesky factorisation C + shift I = R^T R, then a block Krylov space of the inverse. Of all polynomial filters
// of its degree in C^-1 it holds the best one for every eigenvector separately, so it needs no bounds on the spectrum,
// and isolated tiny eigenvalues cost one dimension each instead of spoiling the filter.
FilterResult filtered(const at::Tensor& C, int64_t r, const FilterOptions& options);

}  // namespace lora_null
