#include "covariance.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <type_traits>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lora_null {
namespace {

// Tokens per product. Sums inside a product are plain chains, those across products add pairs of partial sums, so
// that the error grows with kStep + T / kStep (d = T = 4096, fp32, Frobenius: 1.6e-7 at 128 tokens, 2.3e-7 at 256,
// 7.9e-7 at 512; MKL's full product 1.8e-7; the time is the same).
constexpr int64_t kStep = 128;
// Lengths of the last product of a stream are rounded up to this, with zero rows: every length is compiled once.
constexpr int64_t kLength = 32;
// Largest side of a tile: its fp32 sums and a step of both operands fill half of a 1 MiB cache in bf16.
constexpr int64_t kSide = 256;
// Rows of a diagonal tile multiplied at a time, up to their own diagonal.
constexpr int64_t kDiagonal = 64;
// Tokens packed at a time: as many as make 64 MiB of both forms in fp32, within bounds. Fewer, and C passes through
// memory too often (bf16, d = T = 4096: 192 ms with 1024 or 2048 tokens, up to 240 ms with 512); more, and the sums of
// a slab, which are added to C once, gather more roundings (d = 576, T = 8192: 0.54 of MKL's error, or 1.13).
constexpr int64_t kPacked = int64_t{1} << 23;
constexpr int64_t kFewest = 512, kMost = 2048;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Side of the square tiles: columns split evenly, enough tiles for every thread.
int64_t tile_side(int64_t d) {
  int64_t panels = ceil_div(d, kSide);
  const int64_t most = ceil_div(d, kDiagonal), wanted = 4 * at::get_num_threads();
  while (panels < most && panels * (panels + 1) / 2 < wanted) ++panels;
  return round_up(ceil_div(d, panels), kDiagonal);
}

// Memory that a thread keeps from call to call: fresh pages cost as much as packing into them. In huge pages, because
// the tiles of a product fill half of a second-level cache and must not collide in it by the accident of 4 KiB pages.
class Scratch {
 public:
  template <typename T>
  T* get(int64_t count) {
    const int64_t bytes = count * sizeof(T);
    if (size_ < bytes) {
      size_ = 0;
      memory_.reset();
      const int64_t size = round_up(bytes, kPage);
      memory_.reset(std::aligned_alloc(kPage, size));
      TORCH_CHECK(memory_, "covariance_update: no memory for ", size, " bytes of packed operands");
#if defined(__linux__)
      madvise(memory_.get(), size, MADV_HUGEPAGE);
#endif
      size_ = size;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  static constexpr int64_t kPage = int64_t{1} << 21;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

thread_local Scratch operands, tile_sums;

// The operands of all products of a slab of x, copied once into their layouts. left: per panel of columns and step of
// tokens (side, length) = x^T. right: per panel and step (length, side) = x, in bf16 with the elements of two
// consecutive tokens side by side, as the instructions read them. Zero where x ends.
template <typename T>
class Packed {
 public:
  Packed(int64_t d, int64_t tokens)
      : side_(tile_side(d)),
        panels_(ceil_div(d, side_)),
        capacity_(ceil_div(tokens, kStep)),
        buffers_(operands.get<T>(2 * panels_ * capacity_ * side_ * kStep)) {}

  void fill(const at::Tensor& x);

  int64_t side() const { return side_; }
  int64_t panels() const { return panels_; }
  int64_t steps() const { return steps_; }
  int64_t length(int64_t step) const { return step + 1 < steps_ ? kStep : last_; }
  T* left(int64_t panel, int64_t step) const { return at(0, panel, step); }
  T* right(int64_t panel, int64_t step) const { return at(1, panel, step); }

 private:
  T* at(int64_t which, int64_t panel, int64_t step) const {
    return buffers_ + ((which * panels_ + panel) * capacity_ + step) * side_ * kStep;
  }

  int64_t side_, panels_, capacity_;
  T* buffers_;
  int64_t steps_ = 0, last_ = 0;  // last_: length of the last step
};

// (tokens, columns) of x into (side, length) and (length, side); both buffers are whole, what x lacks is zero.
template <typename T>
void pack_block(const T* x, int64_t stride, int64_t tokens, int64_t columns, int64_t side, int64_t length, T* left,
                T* right) {
  constexpr int64_t kBlock = 16;
  if (tokens < length || columns < side) {
    std::fill_n(left, side * length, T(0));
    std::fill_n(right, side * length, T(0));
  }
  for (int64_t t0 = 0; t0 < tokens; t0 += kBlock)
    for (int64_t c0 = 0; c0 < columns; c0 += kBlock)
      for (int64_t c = c0; c < std::min(columns, c0 + kBlock); ++c)
        for (int64_t t = t0; t < std::min(tokens, t0 + kBlock); ++t) left[c * length + t] = x[t * stride + c];
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t t = 0; t < tokens; ++t) std::memcpy(right + t * side, x + t * stride, columns * sizeof(T));
  } else {
    for (int64_t t = 0; t < tokens; t += 2) {
      const T* first = x + t * stride;
      T* out = right + t * side;
      if (t + 1 < tokens) {
        const T* second = first + stride;
        for (int64_t c = 0; c < columns; ++c) out[2 * c] = first[c], out[2 * c + 1] = second[c];
      } else {
        for (int64_t c = 0; c < columns; ++c) out[2 * c] = first[c];
      }
    }
  }
}

template <typename T>
void Packed<T>::fill(const at::Tensor& x) {
  const int64_t tokens = x.size(0), d = x.size(1), stride = x.stride(0);
  steps_ = ceil_div(tokens, kStep);
  last_ = round_up(tokens - (steps_ - 1) * kStep, kLength);
  const T* source = x.const_data_ptr<T>();
  at::parallel_for(0, panels_ * steps_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t panel = block / steps_, step = block % steps_, column = panel * side_, token = step * kStep;
      pack_block(source + token * stride + column, stride, std::min(kStep, tokens - token), std::min(side_, d - column),
                 side_, length(step), left(panel, step), right(panel, step));
    }
  });
}

// sums (side, side) = the tile (i, j) of x^T x over the slab; above the diagonal of a diagonal tile: unspecified.
template <typename T>
void multiply_tile(const Packed<T>& packed, int64_t i, int64_t j, float* sums) {
  const int64_t side = packed.side(), rows = i == j ? kDiagonal : side;
  for (int64_t step = 0; step < packed.steps(); ++step) {
    const int64_t length = packed.length(step);
    for (int64_t row = 0; row < side; row += rows)
      at::native::cpublas::brgemm(rows, i == j ? row + rows : side, length, length, side, side, step > 0,
                                  packed.left(i, step) + row * length, packed.right(j, step), sums + row * side,
                                  /*is_vnni=*/!std::is_same_v<T, float>);
  }
}

// C (rows of ldc elements) += the products of the slab, on and below the diagonal.
template <typename T>
void add_products(const Packed<T>& packed, float* C, int64_t ldc, int64_t d) {
  const int64_t side = packed.side(), tiles = packed.panels() * (packed.panels() + 1) / 2;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    float* sums = tile_sums.get<float>(side * side);
    for (int64_t tile; (tile = next++) < tiles;) {
      int64_t i = 0;
      while ((i + 1) * (i + 2) / 2 <= tile) ++i;
      const int64_t j = tile - i * (i + 1) / 2;
      multiply_tile(packed, i, j, sums);
      for (int64_t row = i * side; row < std::min(d, (i + 1) * side); ++row) {
        const float* from = sums + (row - i * side) * side;
        float* to = C + row * ldc + j * side;
        const int64_t columns = std::min(side, row + 1 - j * side);
        for (int64_t column = 0; column < columns; ++column) to[column] += from[column];
      }
    }
    // The tile registers of AMX belong to the thread until it gives them back.
    if constexpr (!std::is_same_v<T, float>) at::native::cpublas::brgemm_release(true);
  });
}

template <typename T>
void update(const at::Tensor& C, const at::Tensor& x) {
  const int64_t tokens = x.size(0), d = x.size(1), most = std::clamp(kPacked / d / kStep * kStep, kFewest, kMost);
  const auto type = c10::CppTypeToScalarType<T>::value;
  Packed<T> packed(d, std::min(tokens, most));
  for (int64_t start = 0; start < tokens; start += most) {
    const at::Tensor slab = x.narrow(0, start, std::min(most, tokens - start)).to(type);
    packed.fill(slab.stride(1) == 1 ? slab : slab.contiguous());
    add_products(packed, C.mutable_data_ptr<float>(), C.stride(0), d);
  }
}

}  // namespace

bool multiplies_bf16() {
  static const bool answer = [] {
#if defined(__x86_64__) && defined(__GNUC__)
    if (!__builtin_cpu_supports("avx512bf16")) return false;  // oneDNN would emulate them, slower than fp32
#else
    return false;
#endif
    // oneDNN may have been told to ignore them (ONEDNN_MAX_CPU_ISA).
    const std::vector<at::BFloat16> ones(kLength * kLength, at::BFloat16(1));
    std::vector<float> sums(kLength * kLength);
    try {
      at::native::cpublas::brgemm(kLength, kLength, kLength, kLength, kLength, kLength, false, ones.data(), ones.data(),
                                  sums.data(), true);
      at::native::cpublas::brgemm_release(true);
    } catch (const std::exception&) {  // torch where oneDNN has no bf16 at all, oneDNN where it lacks this product
      return false;
    }
    return sums.front() == kLength && sums.back() == kLength;
  }();
  return answer && at::globalContext().userEnabledMkldnn();
}

void covariance_update(const at::Tensor& C, const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 2, "covariance_update: expected x (T, d), got ", x.dim(), " dimensions");
  const int64_t T = x.size(0), d = x.size(1);
  TORCH_CHECK(C.is_cpu() && x.is_cpu() && C.scalar_type() == at::kFloat && C.dim() == 2 && C.size(0) == d &&
                  C.size(1) == d && (C.stride(1) == 1 || d == 1),
              "covariance_update: expected C (d, d) fp32 with unit column stride and x (T, d) on the CPU");
  if (T == 0 || d == 0) return;
  if (x.scalar_type() == at::kBFloat16 && multiplies_bf16())
    update<at::BFloat16>(C, x);
  else
    update<float>(C, x);
}

}  // namespace lora_null
