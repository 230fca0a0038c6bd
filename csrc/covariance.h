// C += X^T X on the CPU, one triangle, in tiles that stay in the cache.
#pragma once

#include <ATen/core/Tensor.h>

namespace lora_null {

// Whether products of bf16 operands run on the CPU's own bf16 instructions (AVX512-BF16 or AMX), accumulated in fp32.
bool multiplies_bf16();

// Add x^T x to the lower triangle of C; what lies above its diagonal is neither read nor written.
//   C: (d, d) fp32 with unit column stride.
//   x: (T, d) fp32, bf16 or fp16, any strides.
// The order of every sum is fixed: the result is the same, bit for bit, for any number of threads.
void covariance_update(const at::Tensor& C, const at::Tensor& x);

}  // namespace lora_null
