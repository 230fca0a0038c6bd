#include "null_space.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "krylov.h"

namespace lora_null {
namespace {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Stop when the predicted excess is this part of tol: the prediction extrapolates a sequence of upper bounds.
constexpr double kSafety = 0.5;
// Relative spread below which Ritz values count as one repeated eigenvalue.
constexpr double kCluster = 1e-3;

class Stopwatch {
 public:
  // Seconds since the construction or the last lap.
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - start_).count();
    start_ = now;
    return seconds;
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Small blocks reach higher degrees for the same work, large ones run nearer to the peak.
int64_t block_size(int64_t r, int64_t d) { return std::min(d, std::max<int64_t>(8, 8 * ((r + 31) / 32))); }

struct Prediction {
  double excess;  // energy still to be lost
  double rate;    // factor it falls by per cycle
};

// Energies of equal cycles fall at least geometrically, so that with the last two falls a, b the rest is below
// b q / (1 - q), q = b / a.
Prediction predict(const std::vector<double>& energies) {
  const size_t n = energies.size();
  if (n < 3) return {kInfinity, 0};
  const double before = energies[n - 3] - energies[n - 2], last = energies[n - 2] - energies[n - 1];
  if (last <= 0) return {0, 0};
  const double rate = before > 0 ? std::min(0.95, last / before) : 0.95;
  return {last * rate / (1 - rate), rate};
}

// Bound the energy to be won if a repeated eigenvalue has more copies than the start block can show. A Krylov space
// with `width` random start vectors sees at most `width` copies of an eigenvalue. Where that many coincide, further
// copies would replace the values between them and r.
double missing_copies(const std::vector<double>& values, int64_t r, int64_t width, double closeness) {
  double worst = 0;
  for (int64_t i = 0; i + width < r; ++i) {
    const int64_t j = i + width - 1;
    if (values[j] - values[i] > kCluster * std::abs(values[j]) + closeness) continue;
    const double above = std::accumulate(values.begin() + j + 1, values.begin() + r, 0.0);
    worst = std::max(worst, above - static_cast<double>(r - j - 1) * values[i]);
  }
  return worst;
}

// Rayleigh-Ritz with C itself on r + oversample vectors, residuals, and the final tests.
void finish(const at::Tensor& C, int64_t r, const FilterOptions& options, const Krylov& space, double energy,
            double norm, FilterResult& result) {
  auto U = space.ritz_vectors(std::min(r + options.oversample, space.size()));
  auto CU = at::mm(U, C);
  auto H = at::mm(CU, U.mT());
  auto [values, S] = at::linalg_eigh((H + H.mT()) / 2, "L");
  auto first = S.narrow(1, 0, r).mT();
  auto basis = at::mm(first, U);
  auto residuals = (at::mm(first, CU) - values.narrow(0, 0, r).unsqueeze(1) * basis).norm(2, 1).cpu();
  values = values.cpu();

  const double true_energy = values.narrow(0, 0, r).sum().item<double>();
  const double rms = residuals.norm().item<double>() / std::sqrt(static_cast<double>(r));
  const double largest = values.abs().max().item<double>();
  const double slack = static_cast<double>(r) * kEpsilon * norm;
  result.residual = residuals.max().item<double>() / norm;
  // Both tests fail only where rounding has destroyed the recurrence, whose energy is then wrong. A residual rho
  // towards the large eigenvalues costs rho^2 / |C| of energy: below |C| sqrt(eps) it is rounding.
  if (!(std::abs(true_energy - energy) <= 10 * (options.tol * std::abs(true_energy) + slack))) {
    result.reason = "the recurrence lost its accuracy";
  } else if (!(rms <= 10 * std::sqrt(options.tol) * largest + std::sqrt(kEpsilon) * norm)) {
    result.reason = "the residuals are too large";
  } else {
    result.basis = basis.mT().contiguous();
    result.values = values;
  }
}

}  // namespace

FilterResult filtered(const at::Tensor& C, int64_t r, const FilterOptions& options) {
  FilterResult result;
  Stopwatch watch;
  const int64_t d = C.size(0);
  const double norm = C.norm().item<double>();
  const Factor factor(C, C.diagonal().sum().item<double>() / static_cast<double>(d));
  result.factor_seconds = watch.lap();
  result.shift = factor.shift();
  result.attempts = factor.attempts();
  if (!factor.ok()) {
    result.reason = "no shift makes the factorisation succeed";
    return result;
  }

  const int64_t b = block_size(r, d);
  const int64_t cycle = std::max(b, r / 2);  // columns between two tests
  int64_t target = std::min(d, 2 * r + cycle);
  Krylov space(factor, C, std::min(d, target + options.max_cycles * cycle), b, options.seed);
  const double rounding = kEpsilon * norm;
  std::vector<double> energies;  // of the cycles since the last injection
  double energy = 0, before = kInfinity;
  int64_t width = b, settle = 0;
  for (;;) {
    while (space.size() < target && space.room(width)) space.extend();
    result.iterate_seconds += watch.lap();

    auto ritz = space.ritz_values() - factor.shift();
    const std::vector<double> values(ritz.data_ptr<double>(), ritz.data_ptr<double>() + ritz.size(0));
    energy = std::accumulate(values.begin(), values.begin() + r, 0.0);
    energies.push_back(energy);
    ++result.cycles;
    result.test_seconds += watch.lap();

    const double allowed = options.tol * std::abs(energy) + static_cast<double>(r) * rounding;
    const auto [excess, rate] = predict(energies);
    const int64_t left = options.max_cycles - result.cycles;
    if (space.complete()) break;  // nothing is left to converge
    if (space.size() < target || left <= 0) {
      result.reason = "not converged after " + std::to_string(result.cycles) + " cycles";
      break;
    }
    if (excess <= kSafety * allowed && space.steps() >= settle) {
      const double closeness = 10 * rounding + kCluster * factor.shift();
      if (before - energy <= allowed || missing_copies(values, r, width, closeness) <= allowed) break;
      // Look for the copies from new random directions; what they do not find is not there.
      before = energy;
      energies.clear();
      settle = space.steps() + 1 + std::max<int64_t>(3, space.steps() / 3);
      width += b;
      if (space.room(width)) space.extend(b);
    } else if (!options.patient && rate > 0 && std::isfinite(excess)) {
      // The rate improves as the space grows; twice the cycles left is hopeless all the same.
      if (std::log(excess / (kSafety * allowed)) > -2.0 * static_cast<double>(left) * std::log(rate)) {
        result.reason = "converges too slowly to pay";
        break;
      }
    }
    target = std::min(d, space.size() + cycle);
  }
  result.columns = space.size();
  watch.lap();
  if (result.reason.empty()) finish(C, r, options, space, energy, norm, result);
  result.finish_seconds = watch.lap();
  return result;
}

}  // namespace lora_null
