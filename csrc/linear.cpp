#include "linear.h"

#include <ATen/Context.h>
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <map>
#include <mutex>

namespace lora_null {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Keeps autograd and autocast out: dtypes are chosen already, and a backward may run under autocast.
struct Isolated {
  at::AutoDispatchBelowAutograd below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

at::IntArrayRef lead(const Tensor& x) { return x.sizes().slice(0, x.dim() - 1); }

// (T, n) with unit inner stride: a product of other strides may round differently.
Tensor rows(const Tensor& x) {
  const Tensor flat = x.dim() == 2 ? x : x.reshape({c10::multiply_integers(lead(x)), x.size(-1)});
  return flat.stride(1) == 1 || flat.size(1) == 1 ? flat : flat.contiguous();
}

// Not a view to autograd, so that callers may write into it.
Tensor unrows(const Tensor& matrix, at::IntArrayRef leading) {
  if (leading.size() == 1) return matrix;
  auto shape = leading.vec();
  shape.push_back(matrix.size(1));
  return at::_unsafe_view(matrix, shape);
}

// A call of the dispatcher takes as long as a small product, also one that does nothing.
Tensor cast(const Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

// beta = 0 ignores the uninitialised operand; alpha scales before the only rounding.
Tensor scaled_mm(const Tensor& a, const Tensor& b, double alpha) {
  if (alpha == 1) return at::mm(a, b);
  return at::empty({a.size(0), b.size(1)}, a.options()).addmm_(a, b, 0, alpha);
}

// An fp32 result where the vendor offers one: gradients of fp32 factors deserve it.
Tensor mm_fp32(const Tensor& a, const Tensor& b, double alpha) {
  const auto dtype = a.scalar_type();
  const bool narrow = dtype == at::kBFloat16 || dtype == at::kHalf;
  if (!narrow || !a.is_cuda() || at::Context::hasROCM()) return scaled_mm(a, b, alpha);
  const Tensor product = at::mm(a, b, at::kFloat);
  return alpha == 1 ? product : product.mul_(alpha);
}

Tensor folded(const Tensor& lora_B, const Tensor& mixing) {
  return mixing.defined() ? at::mm(cast(lora_B, mixing.scalar_type()), mixing) : lora_B;
}

Tensor up(const Tensor& x, const Tensor& weight, const Tensor& S, const Tensor& lora_B, const OptionalTensor& bias,
          const OptionalTensor& mixing, double scaling) {
  const Tensor B = cast(folded(lora_B, mixing.value_or(Tensor())), x.scalar_type()), W = weight.t();
  // The large product first, and as torch does it: with B = 0, y has the bits of the layer without an adapter.
  return (bias.has_value() ? at::addmm(*bias, x, W) : at::mm(x, W)).addmm_(S, B.t(), 1, scaling);
}

// Whether a large product may accumulate at no cost. Those of oneDNN in bf16 take 1 to 6 % longer for it (2-core EPYC).
bool accumulates(const Tensor& x) {
  return x.is_cuda() || x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble;
}

// dx = dy W + dS A. Where that is free, the small product comes first: the large one reads it while it multiplies.
Tensor gradient_of_x(const Tensor& dy, const Tensor& weight, const Tensor& dS, const Tensor& A) {
  return accumulates(dy) ? at::mm(dS, A).addmm_(dy, weight) : at::mm(dy, weight).addmm_(dS, A);
}

// dS = s dy B M
Tensor gradient_of_S(const Tensor& dy, const Tensor& lora_B, const Tensor& mixing, double scaling) {
  return scaled_mm(dy, cast(folded(lora_B, mixing), dy.scalar_type()), scaling);
}

// dB = s dy^T S M^T
Tensor gradient_of_B(const Tensor& dy, const Tensor& S, const Tensor& mixing, double scaling) {
  const Tensor dB = mm_fp32(dy.t(), S, scaling);
  return mixing.defined() ? at::mm(cast(dB, mixing.scalar_type()), mixing.t()) : dB;
}

// Behind gradients that were asked for with create_graph=True: only their own gradient raises.
struct OnceDifferentiable : torch::autograd::Function<OnceDifferentiable> {
  static variable_list forward(AutogradContext*, const variable_list* gradients, at::TensorList) { return *gradients; }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "lora_null's linear operations are differentiable once, and a second derivative was asked for "
                "(create_graph=True, or a Hessian). Set LORA_NULL_LINEAR_BACKEND=torch, or call "
                "lora_null.ops.reference.");
  }
};

variable_list once(variable_list gradients, const variable_list& saved, const variable_list& cotangents) {
  if (!at::GradMode::is_enabled()) return gradients;
  variable_list origins;
  for (const auto* list : {&saved, &cotangents}) {
    for (const Tensor& tensor : *list) {
      if (tensor.defined()) origins.push_back(tensor);
    }
  }
  variable_list defined;
  for (const Tensor& tensor : gradients) {
    if (tensor.defined()) defined.push_back(tensor);
  }
  auto guarded = OnceDifferentiable::apply(&defined, at::TensorList(origins));
  size_t next = 0;
  for (Tensor& tensor : gradients) {
    if (tensor.defined()) tensor = guarded[next++];
  }
  return gradients;
}

using Node = torch::autograd::Node;
using NodePtr = decltype(torch::autograd::Edge::function);  // shared, or intrusive from torch 2.13 on

template <typename T>
std::weak_ptr<T> weak(const std::shared_ptr<T>& node) {
  return node;
}

template <typename T>
c10::weak_intrusive_ptr<T> weak(const c10::intrusive_ptr<T>& node) {
  return c10::weak_intrusive_ptr<T>(node);
}

// dx so far of layers that read one x through one projection, by the node that projected and the backward at work.
// Their products accumulate into one tensor, where autograd would keep one for each layer and add them up: for q, k
// and v, 7 passes over (T, d) instead of 11, and none outside of a product.
class SharedGradients {
 public:
  void add(const NodePtr& projector, const Tensor& dy, const Tensor& weight) {
    Tensor dx = take(projector.get());
    dx = dx.defined() ? dx.addmm_(dy, weight) : at::mm(dy, weight);
    std::lock_guard<std::mutex> lock(mutex_);
    // What a backward that failed has left goes with its graph.
    for (auto it = entries_.begin(); it != entries_.end();) it = it->second.first.expired() ? entries_.erase(it) : ++it;
    entries_.insert_or_assign(key(projector.get()), std::make_pair(weak(projector), dx));
  }

  Tensor take(const Node* projector) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.extract(key(projector));
    return found.empty() ? Tensor() : found.mapped().second;
  }

 private:
  using Key = std::pair<const Node*, int64_t>;
  static Key key(const Node* projector) { return {projector, torch::autograd::get_current_graph_task_id()}; }

  std::mutex mutex_;
  std::map<Key, std::pair<decltype(weak(std::declval<NodePtr>())), Tensor>> entries_;
};

SharedGradients& shared_gradients() {
  static auto* const gradients = new SharedGradients;  // never destroyed: its tensors may outlive their allocators
  return *gradients;
}

std::pair<Tensor, Tensor> project_and_apply(const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                                            const Tensor& lora_B, const OptionalTensor& bias,
                                            const OptionalTensor& mixing, double scaling) {
  Isolated guard;
  const Tensor flat = rows(x), S = at::mm(flat, cast(lora_A, x.scalar_type()).t());
  return {unrows(up(flat, weight, S, lora_B, bias, mixing, scaling), lead(x)), unrows(S, lead(x))};
}

Tensor apply_projected(const Tensor& x, const Tensor& weight, const Tensor& projected, const Tensor& lora_B,
                       const OptionalTensor& bias, const OptionalTensor& mixing, double scaling) {
  Isolated guard;
  return unrows(up(rows(x), weight, rows(projected), lora_B, bias, mixing, scaling), lead(x));
}

bool requires_grad(const OptionalTensor& tensor) { return tensor.has_value() && tensor->requires_grad(); }

struct LoraLinear : torch::autograd::Function<LoraLinear> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                               const Tensor& lora_B, const OptionalTensor& bias, const OptionalTensor& mixing,
                               double scaling, bool projection) {
    const auto [y, S] = project_and_apply(x, weight, lora_A, lora_B, bias, mixing, scaling);
    const bool need_x = x.requires_grad(), need_A = lora_A.requires_grad();
    ctx->save_for_backward({need_A ? x : Tensor(), need_x ? weight : Tensor(), need_x ? lora_A : Tensor(),
                            need_x || need_A ? lora_B : Tensor(), lora_B.requires_grad() ? S : Tensor(),
                            mixing.value_or(Tensor())});
    if (projection && !need_x && !need_A) ctx->mark_non_differentiable({S});
    ctx->saved_data["scaling"] = scaling;
    if (requires_grad(bias)) ctx->saved_data["bias"] = true;
    ctx->set_materialize_grads(false);
    return projection ? variable_list{y, S} : variable_list{y};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list gradients(8);  // of x, weight, lora_A, lora_B, bias, mixing, scaling, projection
    const Tensor dS_elsewhere = cotangents.size() == 2 ? cotangents[1] : Tensor();
    if (cotangents[0].defined() || dS_elsewhere.defined()) compute(ctx, saved, cotangents[0], dS_elsewhere, gradients);
    return once(std::move(gradients), saved, cotangents);
  }

  static void compute(AutogradContext* ctx, const variable_list& saved, const Tensor& dy_of_y,
                      const Tensor& dS_elsewhere, variable_list& gradients) {
    Isolated guard;
    const Tensor &x = saved[0], &weight = saved[1], &lora_A = saved[2], &lora_B = saved[3], &S = saved[4],
                 &mixing = saved[5];
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const bool has_dy = dy_of_y.defined();
    const auto leading = lead(has_dy ? dy_of_y : dS_elsewhere);
    const Tensor dy =
        has_dy ? rows(dy_of_y) : dS_elsewhere.new_zeros({c10::multiply_integers(leading), lora_B.size(0)});
    if (lora_B.defined()) {
      Tensor dS = gradient_of_S(dy, lora_B, mixing, scaling);
      if (dS_elsewhere.defined()) dS.add_(rows(dS_elsewhere));
      if (weight.defined()) {
        const Tensor A = cast(lora_A, dS.scalar_type());
        Tensor dx = shared_gradients().take(torch::autograd::get_current_node().get());
        dx = dx.defined() ? dx.addmm_(dS, A).addmm_(dy, weight) : gradient_of_x(dy, weight, dS, A);
        gradients[0] = unrows(dx, leading);
      }
      if (x.defined()) gradients[2] = mm_fp32(dS.t(), rows(x), 1);
    }
    if (has_dy && S.defined()) gradients[3] = gradient_of_B(dy, rows(S), mixing, scaling);
    if (has_dy && ctx->saved_data.count("bias") != 0) gradients[4] = dy.sum(0);
  }
};

// The node that made the projection of the layer at work, if it will run in this backward and from the same x.
NodePtr projector();

struct LoraUpLinear : torch::autograd::Function<LoraUpLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& projected,
                        const Tensor& lora_B, const OptionalTensor& bias, const OptionalTensor& mixing,
                        double scaling) {
    ctx->save_for_backward({x.requires_grad() ? weight : Tensor(), lora_B.requires_grad() ? projected : Tensor(),
                            projected.requires_grad() ? lora_B : Tensor(), mixing.value_or(Tensor())});
    ctx->saved_data["scaling"] = scaling;
    if (requires_grad(bias)) ctx->saved_data["bias"] = true;
    ctx->set_materialize_grads(false);
    return apply_projected(x, weight, projected, lora_B, bias, mixing, scaling);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list gradients(7);  // of x, weight, projected, lora_B, bias, mixing, scaling
    if (cotangents[0].defined()) compute(ctx, saved, cotangents[0], gradients);
    return once(std::move(gradients), saved, cotangents);
  }

  static void compute(AutogradContext* ctx, const variable_list& saved, const Tensor& dy_of_y,
                      variable_list& gradients) {
    Isolated guard;
    const Tensor &weight = saved[0], &projected = saved[1], &lora_B = saved[2], &mixing = saved[3];
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const Tensor dy = rows(dy_of_y);
    if (weight.defined() && ctx->needs_input_grad(0)) {
      if (const auto other = accumulates(dy) ? projector() : nullptr) {
        shared_gradients().add(other, dy, weight);
      } else {
        gradients[0] = unrows(at::mm(dy, weight), lead(dy_of_y));
      }
    }
    if (lora_B.defined()) gradients[2] = unrows(gradient_of_S(dy, lora_B, mixing, scaling), lead(dy_of_y));
    if (projected.defined()) gradients[3] = gradient_of_B(dy, rows(projected), mixing, scaling);
    if (ctx->saved_data.count("bias") != 0) gradients[4] = dy.sum(0);
  }
};

NodePtr projector() {
  const auto node = torch::autograd::get_current_node();
  if (!node || !node->task_should_compute_output(2)) return nullptr;
  const auto& x = node->next_edge(0);
  const auto& projected = node->next_edge(2);
  const auto* other = dynamic_cast<torch::autograd::CppNode<LoraLinear>*>(projected.function.get());
  return other != nullptr && other->next_edge(0) == x ? projected.function : nullptr;
}

template <typename... Tensors>
bool tracked(const OptionalTensor& bias, const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(bias) || (tensors.requires_grad() || ...));
}

bool ordinary(const Tensor& tensor, const Tensor& x) {
  const auto dtype = tensor.scalar_type();
  const bool real = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
  return real && tensor.device() == x.device() && tensor.layout() == at::kStrided && !tensor.is_nested();
}

bool ordinary(const OptionalTensor& tensor, const Tensor& x) { return !tensor.has_value() || ordinary(*tensor, x); }

bool fit(const LinearCall& call, bool projected) {
  const auto& [x, weight, factor, lora_B, bias, mixing, scaling] = call;
  if (x.dim() < 1 || weight.dim() != 2 || lora_B.dim() != 2 || factor.dim() != (projected ? x.dim() : 2)) return false;
  const int64_t d = x.size(-1), m = weight.size(0), p = projected ? factor.size(-1) : factor.size(0);
  const bool joins = projected ? lead(factor) == lead(x) : factor.size(1) == d;
  const bool mixes = mixing.has_value() ? mixing->dim() == 2 && mixing->size(0) == lora_B.size(1) &&
                                              mixing->size(1) == p && !mixing->requires_grad()
                                        : lora_B.size(1) == p;
  return joins && mixes && weight.size(1) == d && lora_B.size(0) == m &&
         (!bias.has_value() || (bias->dim() == 1 && bias->size(0) == m));
}

// The type in which a tensor is multiplied: autocast's, where that is on.
at::ScalarType computed_type(const Tensor& tensor) {
  const auto device = tensor.device().type();
  const bool stays = tensor.scalar_type() == at::kDouble || !at::autocast::is_autocast_enabled(device);
  return stays ? tensor.scalar_type() : at::autocast::get_autocast_dtype(device);
}

}  // namespace

const char* reason_against(const LinearCall& call, bool projected) {
  const auto& [x, weight, factor, lora_B, bias, mixing, scaling] = call;
  if (!x.is_cpu() && !x.is_cuda()) return "x is neither on a CPU nor on a CUDA device";
  if (!ordinary(x, x) || !ordinary(weight, x) || !ordinary(factor, x) || !ordinary(lora_B, x) || !ordinary(bias, x) ||
      !ordinary(mixing, x)) {
    return "a tensor is not a dense one of bf16, fp16, fp32 or fp64 on the device of x";
  }
  if (weight.requires_grad()) return "the weight requires a gradient";
  if (!fit(call, projected)) return "the shapes do not fit";
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      c10::impl::TorchDispatchModeTLS::any_modes_set() || at::tracer::impl::is_dispatch_enabled()) {
    return "a tracer, a mode or a transform has to see operations";
  }
  const auto type = computed_type(x);
  if (computed_type(weight) != type || (bias.has_value() && computed_type(*bias) != type)) {
    return "x, the weight and the bias differ in type";
  }
  return nullptr;
}

LinearCall computed(LinearCall call, bool projected) {
  const auto type = computed_type(call.x);
  call.x = cast(call.x, type);
  call.weight = cast(call.weight, type);
  if (call.bias.has_value()) call.bias = cast(*call.bias, type);
  if (projected) call.factor = cast(call.factor, type);
  return call;
}

std::pair<Tensor, Tensor> lora_linear(const LinearCall& call, bool projection) {
  const auto& [x, weight, lora_A, lora_B, bias, mixing, scaling] = call;
  if (!tracked(bias, x, lora_A, lora_B)) {
    return project_and_apply(x, weight, lora_A, lora_B, bias, mixing, scaling);
  }
  const auto outputs = LoraLinear::apply(x, weight, lora_A, lora_B, bias, mixing, scaling, projection);
  return {outputs[0], projection ? outputs[1] : Tensor()};
}

Tensor lora_up_linear(const LinearCall& call) {
  const auto& [x, weight, projected, lora_B, bias, mixing, scaling] = call;
  if (!tracked(bias, x, projected, lora_B)) {
    return apply_projected(x, weight, projected, lora_B, bias, mixing, scaling);
  }
  return LoraUpLinear::apply(x, weight, projected, lora_B, bias, mixing, scaling);
}

}  // namespace lora_null
