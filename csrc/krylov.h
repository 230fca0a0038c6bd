// The Krylov space behind filtered(): factorisation, growth, Rayleigh-Ritz.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace lora_null {

// V -> V (C + shift I)^-1 for row blocks V (b, d).
class Factor {
 public:
  // scale: tr(C) / d, the unit of the shift. The shift is enlarged until the factorisation succeeds.
  Factor(const at::Tensor& C, double scale);

  bool ok() const { return R_.defined(); }
  double shift() const { return shift_; }
  int64_t attempts() const { return attempts_; }
  at::Tensor solve(const at::Tensor& V) const;

 private:
  at::Tensor R_;  // (d, d) upper triangular
  double shift_;
  int64_t attempts_ = 0;
  // The diagonal blocks of R, inverted once, so that a solve is a chain of large products.
  std::vector<at::Tensor> inverses_;
};

// k orthonormal rows spanning the strongest directions of the rows of W, orthogonal to the rows of Q.
at::Tensor orthonormalise(at::Tensor W, const at::Tensor& Q, int64_t k);

// An orthonormal basis Q of the Krylov space, as rows, and T = Q^T C^-1 Q, grown block by block.
class Krylov {
 public:
  Krylov(const Factor& factor, const at::Tensor& C, int64_t capacity, int64_t b, int64_t seed);

  int64_t size() const { return n_; }
  int64_t steps() const { return steps_; }
  bool complete() const { return n_ == d_; }  // the space is everything there is
  bool room(int64_t width) const;             // for a step that adds up to width vectors

  // Multiply the last block by the inverse; add the new directions, and `inject` random ones.
  void extend(int64_t inject = 0);

  // Ritz values of C + shift I on the space C^-1 Q, ascending, on the host.
  at::Tensor ritz_values() const;
  // The Ritz vectors of the `count` smallest, orthonormal rows (count, d).
  at::Tensor ritz_vectors(int64_t count) const;

 private:
  std::pair<at::Tensor, at::Tensor> projected() const;
  at::Tensor fresh(int64_t count);

  const Factor& factor_;
  at::Generator generator_;
  at::Tensor Q_;  // (rows, d)
  at::Tensor T_;  // (rows, rows) on the host: its eigenproblems are small
  int64_t d_;
  int64_t n_ = 0;         // vectors already multiplied by the inverse
  int64_t m_ = 0;         // n_ and the block that the next step multiplies
  int64_t previous_ = 0;  // where the last multiplied block starts
  int64_t steps_ = 0;
};

}  // namespace lora_null
