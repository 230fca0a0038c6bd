"""What torch does around an operation: compile, autocast, checkpoint, random state, opcheck, subclasses."""

import pytest
import torch
from lora_null.kernels.lora import keep_mask
from torch.utils.checkpoint import checkpoint

from lora_null import ops

# Matrices this small are slower on two threads, and much slower beside another process.
pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("x", "weight", "lora_A", "lora_B", "bias")


def case(dtype=torch.float32, lead=(2, 9), d=24, m=18, r=4, grad=("x", "lora_A", "lora_B")):
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (*lead, d), "weight": (m, d), "lora_A": (r, d), "lora_B": (m, r), "bias": (m,)}
    make = {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    return {name: t.requires_grad_(name in grad) for name, t in make.items()}


def gradients(function, tensors, **options):
    leaves = {name: t.detach().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    y = function(**leaves, **options)
    y.float().square().sum().backward()
    return {"y": y.detach()} | {name: t.grad for name, t in leaves.items() if t.requires_grad}


def assert_same(got, want, **tolerance):
    assert set(got) == set(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], **tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [NAMES, ("x", "lora_B"), ("lora_B",)], ids=" ".join)
def test_opcheck(dtype, grad):
    x, W, A, B, bias = case(dtype, grad=grad).values()
    projected = (x.detach() @ A.detach().t()).requires_grad_("x" in grad)
    mixing = (
        torch.linspace(-1, 1, (len(A) - 1) * len(A))
        .view(len(A) - 1, len(A))
        .to(torch.promote_types(dtype, torch.float32))
    )
    # bf16 results of a compiled and an eager backward may differ by a rounding.
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.1}
    for op, arguments in (
        (torch.ops.lora_null.lora_linear.default, (x, W, A, B, bias, None, 0.7, 0.0, None)),
        (torch.ops.lora_null.lora_linear.default, (x, W, A, B, None, None, 0.7, 0.5, torch.tensor(3))),
        (torch.ops.lora_null.lora_linear.default, (x, W, A, B[:, 1:], None, mixing, 0.7, 0.0, None)),
        (torch.ops.lora_null.lora_up_linear.default, (x, W, projected, B, bias, None, 0.7)),
        (torch.ops.lora_null.lora_up_linear.default, (x, W, projected, B[:, 1:], bias, mixing, 0.7)),
    ):
        torch.library.opcheck(op, arguments, **tolerance)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["auto", "cublas"])
def test_compiled_without_graph_breaks(monkeypatch, backend, dynamic):
    """Plain operations traced, and the custom operations as a whole, as on CUDA."""
    monkeypatch.setenv("LORA_NULL_LINEAR_BACKEND", backend)
    monkeypatch.setenv("LORA_NULL_STRICT", "1")
    torch._dynamo.reset()
    nodes = []

    def compiler(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def block(x, weight, lora_A, lora_B, bias):
        y, S = ops.lora_linear_and_projection(x, weight, lora_A, lora_B, scaling=0.7, bias=bias)
        z = ops.lora_up_linear(x, weight, S, lora_B * 2)
        return ops.lora_linear(y + z, weight.t(), lora_B.t(), lora_A.t(), scaling=0.3) * S.sum()

    compiled = torch.compile(block, fullgraph=True, backend=compiler, dynamic=dynamic)
    for lead in ((2, 9), (5,), (3, 4)) if dynamic else ((2, 9),):
        tensors = case(torch.float64, lead=lead)
        assert_same(gradients(compiled, tensors), gradients(block, tensors), rtol=1e-9, atol=1e-9)
    opaque = {name for name in nodes if "lora_null" in name}
    names = {"lora_linear", "lora_up_linear"} if backend == "cublas" else set()
    assert opaque == {f"lora_null.{name}.default" for name in names}


def test_compiled_dropout_draws_anew():
    torch._dynamo.reset()
    tensors = case()
    compiled = torch.compile(ops.lora_linear, fullgraph=True, backend="aot_eager")
    first, second = (compiled(**tensors, dropout=0.5) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("cast_x", [False, True])
def test_autocast_computes_in_its_dtype(cast_x):
    tensors = case()
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    truth = gradients(ops.lora_linear_reference, exact)

    def cast(function):
        def run(x, **others):
            with torch.autocast("cpu", torch.bfloat16):
                y = function(x.to(torch.bfloat16) if cast_x else x, **others)
                assert y.dtype == torch.bfloat16
                return y

        return run

    def eager(x, weight, lora_A, lora_B, bias):
        down = torch.nn.functional.linear(x, lora_A)
        return torch.nn.functional.linear(x, weight, bias) + torch.nn.functional.linear(down, lora_B)

    own, got = gradients(cast(eager), tensors), gradients(cast(ops.lora_linear), tensors)
    for name, want in truth.items():
        error, torch_error = ((found[name].double() - want).norm() / want.norm() for found in (got, own))
        assert error <= 2 * torch_error + 1e-3, f"{name}: {error:.3g}, torch's own {torch_error:.3g}"
        assert got[name].dtype == own[name].dtype, name


def test_autocast_around_the_backward_changes_nothing():
    tensors = case()
    want = gradients(ops.lora_linear, tensors)
    y = ops.lora_linear(**tensors)
    with torch.autocast("cpu", torch.bfloat16):
        y.float().square().sum().backward()
    for name in ("x", "lora_A", "lora_B"):
        assert torch.equal(tensors[name].grad, want[name]), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing(reentrant, dropout):
    tensors = case(torch.float64)

    def plain(**t):
        return ops.lora_linear(**t, dropout=dropout, scaling=0.7)

    def checkpointed(**t):
        return checkpoint(
            lambda *values: plain(**dict(zip(NAMES, values, strict=True))), *t.values(), use_reentrant=reentrant
        )

    torch.manual_seed(5)
    want = gradients(plain, tensors)
    torch.manual_seed(5)
    assert_same(gradients(checkpointed, tensors), want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("grad", [NAMES, ("x", "lora_B")], ids=" ".join)
def test_dropout_equals_an_explicit_mask(dtype, grad):
    tensors = case(dtype, grad=grad)
    keep = keep_mask(18, 24, dropout=0.3, seed=77, device="cpu").view(2, 9, 24).to(dtype) / 0.7

    def masked(x, weight, lora_A, lora_B, bias, scaling):
        low_rank = (x * keep) @ lora_A.t() @ lora_B.t()
        return torch.nn.functional.linear(x, weight, bias) + scaling * low_rank

    want = gradients(masked, tensors, scaling=0.7)
    for function in (ops.lora_linear, ops.lora_linear_reference):
        got = gradients(function, tensors, scaling=0.7, dropout=0.3, seed=77)
        assert_same(got, want, rtol=100 * torch.finfo(dtype).eps, atol=1e-4 if dtype == torch.float32 else 1e-12)


def test_the_seed_comes_from_torch():
    tensors = case()
    torch.manual_seed(1)
    first = ops.lora_linear(**tensors, dropout=0.5)
    torch.manual_seed(1)
    assert torch.equal(first, ops.lora_linear(**tensors, dropout=0.5))
    assert not torch.equal(first, ops.lora_linear(**tensors, dropout=0.5))
    state = torch.random.get_rng_state()
    ops.lora_linear(**tensors, dropout=0.5, training=False)
    ops.lora_linear(**tensors)
    assert torch.equal(state, torch.random.get_rng_state())


def test_no_mask_and_no_dropped_copy_is_kept():
    tensors = case(lead=(19,))
    shapes = []

    def pack(tensor):
        shapes.append((tuple(tensor.shape), tensor.data_ptr() == tensors["x"].data_ptr()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.lora_linear(**tensors, dropout=0.5)
    assert [is_x for shape, is_x in shapes if shape == (19, 24)] == [True]


def test_fake_tensors_give_shapes_without_computing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in case().items()}
        y = ops.lora_linear(**tensors)
    assert y.shape == (2, 9, 18) and type(y).__name__ == "FakeTensor"


def test_a_tensor_subclass_goes_through_plain_torch(caplog):
    class Packed(torch.Tensor):
        pass

    tensors = {name: t.detach() for name, t in case().items()}
    want = ops.lora_linear_reference(**tensors)
    got = ops.lora_linear(**(tensors | {"weight": tensors["weight"].as_subclass(Packed)}))
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want)


def test_torch_func_transforms():
    x, W, A, B, bias = (t.detach() for t in case(torch.float64).values())

    def loss(op):
        return lambda x, B: op(x, W, A, B, scaling=0.7, bias=bias).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        got, want = (transform(loss(op), argnums=1)(x, B) for op in (ops.lora_linear, ops.lora_linear_reference))
        torch.testing.assert_close(got, want)
    rows = torch.func.vmap(torch.func.grad(loss(ops.lora_linear), argnums=1), in_dims=(0, None))(x, B)
    torch.testing.assert_close(rows.sum(0), torch.func.grad(loss(ops.lora_linear), argnums=1)(x, B))
