#include "krylov.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace lora_null {
namespace {

// Order of the inverted diagonal blocks of the factor.
constexpr int64_t kTile = 256;
// First shift relative to tr(C) / d; above the rounding of the factorisation up to d = 1e5.
constexpr double kShift = 1e-10;
constexpr double kShiftGrowth = 100;
constexpr int64_t kShiftAttempts = 5;
constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

at::Tensor columns(const at::Tensor& X, int64_t begin, int64_t end) { return X.narrow(1, begin, end - begin); }
at::Tensor block(const at::Tensor& X, int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
  return columns(X.narrow(0, row, row_end - row), column, column_end);
}

}  // namespace

Factor::Factor(const at::Tensor& C, double scale) : shift_(kShift * scale) {
  const int64_t d = C.size(0);
  for (attempts_ = 1;; ++attempts_) {
    auto R = C.clone();
    R.diagonal().add_(shift_);
    // In its own memory: at d = 14336 another matrix would be 1.5 GiB. LAPACK's column-major L is R in the row-major
    // order of the products below; C is symmetric.
    auto L = R.mT();
    auto failed = at::empty({}, R.options().dtype(at::kInt));
    at::linalg_cholesky_ex_out(L, failed, L);
    if (failed.item<int>() == 0) {
      R_ = R;
      break;
    }
    if (attempts_ == kShiftAttempts) return;
    shift_ *= kShiftGrowth;
  }
  for (int64_t begin = 0; begin < d; begin += kTile) {
    const int64_t end = std::min(begin + kTile, d);
    inverses_.push_back(at::linalg_solve_triangular(block(R_, begin, end, begin, end),
                                                    at::eye(end - begin, C.options()), /*upper=*/true));
  }
}

at::Tensor Factor::solve(const at::Tensor& V) const {
  auto Y = V.clone();
  const int64_t d = Y.size(1), tiles = static_cast<int64_t>(inverses_.size());
  for (int64_t i = 0; i < tiles; ++i) {  // Y <- V R^-1
    const int64_t begin = i * kTile, end = std::min(begin + kTile, d);
    auto solved = at::mm(columns(Y, begin, end), inverses_[i]);
    columns(Y, begin, end).copy_(solved);
    if (end < d) columns(Y, end, d).addmm_(solved, block(R_, begin, end, end, d), 1, -1);
  }
  for (int64_t i = tiles; i-- > 0;) {  // Y <- Y R^-T
    const int64_t begin = i * kTile, end = std::min(begin + kTile, d);
    auto part = columns(Y, begin, end);
    if (end < d) part = at::addmm(part, columns(Y, end, d), block(R_, begin, end, end, d).mT(), 1, -1);
    columns(Y, begin, end).copy_(at::mm(part, inverses_[i].mT()));
  }
  return Y;
}

// SVQB (Stathopoulos and Wu, 2002). The Gram matrix cannot see directions below the root of the precision; they are
// lifted to where the next pass sees them. They matter: next to an isolated tiny eigenvalue every direction that is
// not its eigenvector is that small.
at::Tensor orthonormalise(at::Tensor W, const at::Tensor& Q, int64_t k) {
  for (int pass = 0; pass < 6; ++pass) {
    // Of no use in the first pass: rounding brings back what it takes off rows of small norm.
    if (pass > 0) W = at::addmm(W, at::mm(W, Q.mT()), Q, 1, -1);
    auto gram = at::mm(W, W.mT()).cpu();
    auto scale = gram.diagonal().clamp_min(1e-300).rsqrt();
    auto [values, vectors] = at::linalg_eigh(scale.unsqueeze(1) * gram * scale, "L");
    const int64_t drop = values.size(0) - k;
    values = values.narrow(0, drop, k);
    auto lift = (columns(vectors, drop, drop + k) / values.clamp_min(1e-14).sqrt()).mT() * scale;
    W = at::mm(lift.to(W.device()), W);
    if (pass > 0 && values[0].item<double>() > 0.5) break;
  }
  return W;
}

Krylov::Krylov(const Factor& factor, const at::Tensor& C, int64_t capacity, int64_t b, int64_t seed)
    // Normal numbers from the CPU's generator: the same start on every device.
    : factor_(factor), generator_(at::detail::createCPUGenerator(seed)), d_(C.size(0)) {
  const int64_t rows = std::min(d_, capacity + 8 * b);  // some room for injected vectors
  Q_ = at::empty({rows, d_}, C.options());
  T_ = at::zeros({rows, rows}, C.options().device(at::kCPU));
  Q_.narrow(0, 0, b).copy_(orthonormalise(fresh(b), Q_.narrow(0, 0, 0), b));
  m_ = b;
}

at::Tensor Krylov::fresh(int64_t count) {
  return at::randn({count, d_}, generator_, at::TensorOptions().dtype(at::kDouble)).to(Q_.device());
}

bool Krylov::room(int64_t width) const {
  const int64_t rows = Q_.size(0);
  return !complete() && (rows == d_ || m_ + width <= rows);
}

void Krylov::extend(int64_t inject) {
  const int64_t start = n_, n = m_;
  auto Q = Q_.narrow(0, 0, n);
  auto Z = factor_.solve(Q.narrow(0, start, n - start));
  auto size = Z.norm(2, 1).max();
  // In exact arithmetic Z has components on the last two blocks only: take those off first, then whatever rounding
  // has left on all the others.
  auto recent = Q.narrow(0, previous_, n - previous_);
  auto near = at::mm(Z, recent.mT());
  Z.addmm_(near, recent, 1, -1);
  auto H = at::mm(Z, Q.mT());
  Z.addmm_(H, Q, 1, -1);
  columns(H, previous_, n).add_(near);

  auto W = Z;
  auto dead = (Z.norm(2, 1) <= 10 * kEpsilon * size).nonzero();
  if (dead.size(0) > 0) {  // an invariant subspace: go on from new directions
    W = Z.clone();
    W.index_copy_(0, dead.squeeze(1), fresh(dead.size(0)));
  }
  if (inject > 0) W = at::cat({W, fresh(inject) * (size / std::sqrt(static_cast<double>(d_)))});
  const int64_t k = std::min(W.size(0), d_ - n);
  block(T_, 0, n, start, n).copy_(H.mT());
  if (k > 0) {
    auto next = Q_.narrow(0, n, k);
    next.copy_(orthonormalise(W, Q, k));
    block(T_, n, n + k, start, n).copy_(at::mm(next, Z.mT()));
  }
  previous_ = start;
  n_ = n;
  m_ = n + k;
  ++steps_;
}

// With u = C^-1 Q s = Q_ext T_ext s: u^T C u = s^T T s and u^T u = |T_ext s|^2, without a product with C. The QR
// factors T_ext = Z R turn that pencil into R^-T Z_top, and Q_ext Z into an orthonormal basis. Returns that matrix
// and Z.
std::pair<at::Tensor, at::Tensor> Krylov::projected() const {
  auto [Z, R] = at::linalg_qr(block(T_, 0, m_, 0, n_));
  auto M = at::linalg_solve_triangular(R.mT(), Z.narrow(0, 0, n_), /*upper=*/false);
  return {(M + M.mT()) / 2, Z};
}

at::Tensor Krylov::ritz_values() const { return at::linalg_eigvalsh(projected().first, "L"); }

at::Tensor Krylov::ritz_vectors(int64_t count) const {
  auto [M, Z] = projected();
  auto S = std::get<1>(at::linalg_eigh(M, "L"));
  return at::mm(at::mm(Z, columns(S, 0, count)).mT().to(Q_.device()), Q_.narrow(0, 0, m_));
}

}  // namespace lora_null
