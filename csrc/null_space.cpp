#include "null_space.h"

#include <ATen/ops/linalg_eigh.h>

namespace lora_null {

NullSpace exact(const at::Tensor& C, int64_t r) {
  auto [eigenvalues, vectors] = at::linalg_eigh(C, "L");
  return {vectors.narrow(1, 0, r).contiguous(), eigenvalues.narrow(0, 0, r).contiguous()};
}

}  // namespace lora_null
