"""The adapted linear in C++: the same bits as in Python, the same tensors kept, the same refusals."""

from types import SimpleNamespace

import pytest
import torch
from linear_tools import NAMES, case
from torch.utils.checkpoint import checkpoint

from lora_null import ops
from lora_null.ops import dispatch
from lora_null.system import extension

# Matrices this small are slower on two threads, and much slower beside another process.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(extension.load() is None, reason="no C++ extension"),
]


@pytest.fixture
def taken(monkeypatch):
    """Count the calls that C++ takes; it is switched off by ``taken.off()``."""

    class Taken(list):
        def off(self):
            monkeypatch.setattr(extension, "ready", lambda: None)

        def __getattr__(self, name):
            def counted(*args):
                output = getattr(module, name)(*args)
                self.extend([name] if output is not None else [])
                return output

            return counted

    calls, module = Taken(), extension.ready()
    monkeypatch.setattr(extension, "ready", lambda: calls)
    return calls


def everything(tensors, mixing, *, used):
    """Outputs and gradients of both operations, one feeding the other, and the tensors kept for the backward."""
    leaves = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    weight, bias, B = leaves["weight"], leaves["bias"], leaves["lora_B"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, S = ops.lora_linear_and_projection(
            leaves["x"], weight, leaves["lora_A"], B, scaling=0.7, bias=bias, mixing=mixing
        )
        z = ops.lora_up_linear(leaves["x"], weight, S, B, scaling=0.3, bias=bias, mixing=mixing)
    sizes = sorted(t.numel() * t.element_size() for t in kept if all(t is not leaf for leaf in leaves.values()))
    outputs = {"y": y, "S": S, "z": z}
    loss = sum((outputs[name].double() ** 2).sum() for name in used)
    if loss.requires_grad:
        loss.backward()
    return {**outputs, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}, sizes


@pytest.mark.parametrize("lead", [(5,), (2, 3), (), (0,), (2, 0), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(
    "dtype, factor_dtype",
    [(torch.float32, None), (torch.float64, None), (torch.bfloat16, torch.float32), (torch.float16, None)],
    ids=str,
)
def test_the_same_bits_as_in_python(lead, dtype, factor_dtype, taken):
    grads = (NAMES[:1] + NAMES[2:], ("x", "lora_B"), ("lora_A", "lora_B"), ("lora_B",), ("bias",), ())
    cases = [(grad, mixed) for grad in grads for mixed in (False, True)]
    results = []
    for path in ("C++", "Python"):
        if path == "Python":
            assert len(taken) == 2 * len(cases)
            taken.off()
        found = []
        for grad, mixed in cases:
            tensors = case(lead, 7, 9, 4, dtype, factor_dtype=factor_dtype, grad=grad)
            mixing = None
            if mixed:
                mixing = torch.linspace(-1, 1, 12, dtype=torch.promote_types(dtype, torch.float32)).view(3, 4)
                tensors["lora_B"] = tensors["lora_B"].detach()[:, 1:].requires_grad_("lora_B" in grad)
            found.append(everything(tensors, mixing, used="yz" if mixed else "ySz"))
        results.append(found)
    assert len(taken) == 2 * len(cases)
    for (got, kept), (want, kept_by_python), (grad, _) in zip(*results, cases, strict=True):
        assert kept == kept_by_python
        for name, value in want.items():
            assert (got[name] is None) == (value is None), (grad, name)
            if value is not None:
                assert got[name].dtype == value.dtype and got[name].requires_grad == value.requires_grad
                # one x and two layers: in C++ their products accumulate, where autograd would round each and add them
                slack = 4 * torch.finfo(dtype).eps * float(value.abs().max()) if name == "dx" and value.numel() else 0.0
                torch.testing.assert_close(got[name], value, rtol=0, atol=slack, msg=f"{grad} {name}")


def group(tensors, scale=1.0):
    """Three layers on one x through one projection, as C++ calls them."""
    x, weight, A, B = (tensors[name] for name in ("x", "weight", "lora_A", "lora_B"))
    y, S = ops.lora_linear_and_projection(x, weight, A, B)
    return [y, *(ops.lora_up_linear(x, weight * k, S, B, scaling=scale) for k in (2, 3))]


def test_layers_that_share_a_projection_sum_dx_inside_their_products(taken):
    tensors = case((64,), 24, 16, 4, torch.bfloat16, grad=("x", "lora_B"))
    tensors["weight"] = tensors["weight"].detach()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = torch.autograd.grad([y.sum() for y in group(tensors)], tensors["x"])[0]
    assert len(taken) == 3
    names = [event.name for event in profile.events()]
    assert names.count("aten::addmm_") >= 3 and not {"aten::add", "aten::add_"} & {
        event.name for event in profile.events() if event.input_shapes and [64, 24] in event.input_shapes
    }
    wide = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    truth = torch.autograd.grad([y.sum() for y in group(wide)], wide["x"])[0]
    taken.off()
    own = torch.autograd.grad([y.sum() for y in group(tensors)], tensors["x"])[0]
    error, python = (float((t.double() - truth).norm()) for t in (got, own))
    assert error <= 1.2 * python


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1, 2), (2,), (0,)], ids=str)
@pytest.mark.parametrize("wanted", [("x", "lora_B"), ("x",), ("lora_B",), ("lora_A",)], ids=str)
def test_any_part_of_a_group_any_gradient_again_and_again(used, wanted, taken):
    tensors = case((5,), 7, 4, 3, torch.float64, grad=("x", "lora_A", "lora_B"))
    tensors["weight"] = tensors["weight"].detach()
    x, weight, A, B = (tensors[name] for name in ("x", "weight", "lora_A", "lora_B"))
    leaves = [tensors[name] for name in wanted]
    plain = [x @ (k * weight).t() + (x @ A.t()) @ B.t() for k in (1, 2, 3)]
    want = torch.autograd.grad(sum(plain[i].square().sum() for i in used), leaves)
    ys = group(tensors)
    # gradients of B alone leave x's unfinished, and nothing of it may reach the backward after it
    for leaf, expected in ([(B, None)] if 2 in used else []) + [(leaves, want)] * 2:
        got = torch.autograd.grad(sum(ys[i].square().sum() for i in used), leaf, retain_graph=True)
        if expected is not None:
            torch.testing.assert_close(got, expected)


def test_a_backward_that_failed_leaves_nothing_to_the_next(taken):
    tensors = case((5,), 7, 4, 3, torch.float64, grad=("x", "lora_B"))
    tensors["weight"] = tensors["weight"].detach()
    want = torch.autograd.grad(sum(y.sum() for y in group(tensors)), tensors["x"])
    ys = group(tensors)
    handle = ys[0].register_hook(lambda gradient: 1 / 0)  # the first layer's backward is the last one
    with pytest.raises(ZeroDivisionError):
        torch.autograd.grad(sum(y.sum() for y in ys), tensors["x"], retain_graph=True)
    handle.remove()
    torch.testing.assert_close(torch.autograd.grad(sum(y.sum() for y in ys), tensors["x"]), want)


def test_layers_of_different_tensors_keep_their_own_dx(taken):
    tensors = case((5,), 7, 4, 3, torch.float64, grad=("x", "lora_B"))
    tensors["weight"] = tensors["weight"].detach()
    x, weight, A, B = (tensors[name] for name in ("x", "weight", "lora_A", "lora_B"))
    other = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    y, S = ops.lora_linear_and_projection(x, weight, A, B)
    z = ops.lora_up_linear(other, weight, S, B)
    got = torch.autograd.grad(y.square().sum() + z.square().sum(), (x, other))
    S = x @ A.t()
    plain = x @ weight.t() + S @ B.t(), other @ weight.t() + S @ B.t()
    torch.testing.assert_close(got, torch.autograd.grad(sum(p.square().sum() for p in plain), (x, other)))


@pytest.mark.parametrize("used", ["y", "S"])
def test_one_of_two_outputs(used, taken):
    tensors = case((5,), 7, 4, 3, torch.float64)
    tensors["weight"].requires_grad_(False)
    results = []
    for _ in range(2):
        leaves = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in tensors.items()}
        outputs = dict(zip("yS", ops.lora_linear_and_projection(**leaves), strict=True))
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        results.append(torch.autograd.grad(outputs[used].square().sum(), wanted, allow_unused=True))
        taken.off()
    assert len(taken) == 1
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_same_bits_with_any_strides(dtype, taken):
    tensors = case((64,), 96, 80, 16, dtype, grad=("x", "lora_A", "lora_B"))
    x = tensors.pop("x").detach()
    dy = torch.randn(64, 80, generator=torch.Generator().manual_seed(1)).to(dtype)
    columns = [t.t().contiguous().t() for t in (x, dy)]
    results = []
    for _ in range(2):
        found = []
        for given, cotangent in ((columns[0], dy), (x, columns[1]), (x, torch.ones_like(dy[0, 0]).expand(64, 80))):
            leaves = given.detach().requires_grad_(), tensors["lora_A"], tensors["lora_B"]
            y = ops.lora_linear(leaves[0], **tensors)
            found += [y, *torch.autograd.grad(y, leaves, cotangent)]
        results.append(found)
        taken.off()
    assert len(taken) == 3
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("scaling", [None, "x", 2j, 10**400, [1.0]], ids=["None", "x", "2j", "huge", "list"])
def test_a_scaling_that_is_no_number(scaling, taken):
    tensors = case((5,), 7, 4, 3, torch.float32, grad=())
    for _ in range(2):
        with pytest.raises((TypeError, ValueError, OverflowError), match="float"):
            ops.lora_linear(**tensors, scaling=scaling)
        taken.off()


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(name):
    """Tangents are not lost, whichever way the call takes."""
    tensors = {n: t.detach() for n, t in case((5,), 7, 4, 3, torch.float64).items()}
    tangent = torch.randn_like(tensors[name])
    want = torch.func.jvp(lambda t: ops.lora_linear_reference(**{**tensors, name: t}), (tensors[name],), (tangent,))[1]
    for grad in (False, True):
        with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(grad):
            dual = torch.autograd.forward_ad.make_dual(tensors[name], tangent)
            y = ops.lora_linear(**{**tensors, name: dual})
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, want)
    got = torch.func.jvp(lambda t: ops.lora_linear(**{**tensors, name: t}), (tensors[name],), (tangent,))[1]
    torch.testing.assert_close(got, want)


def test_an_output_without_a_gradient(taken):
    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    tensors = case((5,), 7, 4, 3, torch.float32, grad=("x", "lora_B"))
    S = torch.randn(5, 3, requires_grad=True)
    for _ in range(2):
        Silent.apply(ops.lora_up_linear(tensors["x"], tensors["weight"], S, tensors["lora_B"])).sum().backward()
        assert tensors["x"].grad is None and tensors["lora_B"].grad is None and S.grad is None
        taken.off()


def test_a_view_of_the_input_and_of_the_cotangent(taken):
    tensors = case((6,), 8, 4, 3, torch.float32, grad=("lora_B",))
    x = torch.randn(8, 6).t()  # columns are contiguous
    x = x[:, ::2].expand(2, 6, 4).requires_grad_()
    tensors |= {"x": x, "weight": tensors["weight"][:, ::2], "lora_A": tensors["lora_A"][:, 1::2]}
    want = torch.autograd.grad(ops.lora_linear_reference(**tensors).sum(), (x, tensors["lora_B"]))
    got = torch.autograd.grad(ops.lora_linear(**tensors).sum(), (x, tensors["lora_B"]))
    assert len(taken) == 1
    torch.testing.assert_close(got, want)


def test_autocast_reaches_neither_forward_nor_backward(taken):
    tensors = case((5,), 7, 4, 3, torch.float32, grad=("x", "lora_B"))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.lora_linear(**tensors)
        assert y.dtype == torch.bfloat16
        got = torch.autograd.grad(y.float().sum(), (tensors["x"], tensors["lora_B"]), retain_graph=True)
    want = torch.autograd.grad(y.float().sum(), (tensors["x"], tensors["lora_B"]))
    assert len(taken) == 1 and got[0].dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_second_derivative_raises_and_create_graph_alone_does_not(taken):
    tensors = case((5,), 7, 4, 3, torch.float64, grad=("x", "lora_A", "lora_B"))
    x, B = tensors["x"], tensors["lora_B"]
    want = torch.autograd.grad(ops.lora_linear(**tensors).square().sum(), (x, B))
    got = torch.autograd.grad(ops.lora_linear(**tensors).square().sum(), (x, B), create_graph=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for gradient in got:
        with pytest.raises(RuntimeError, match="differentiable once"):
            gradient.sum().backward(retain_graph=True)
    S = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = ops.lora_up_linear(x, tensors["weight"], S, B)
    (dS,) = torch.autograd.grad(y.sum(), S, create_graph=True)  # its cotangent has no graph, but B has
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(dS.sum(), B)
    assert len(taken) == 3


def test_a_second_backward_raises(taken):
    tensors = case((5,), 7, 4, 3, torch.float32, grad=("x", "lora_B"))
    y = ops.lora_linear(**tensors)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    y = ops.lora_linear(**tensors)
    with torch.no_grad():
        tensors["lora_B"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert len(taken) == 2


def test_errors_of_python_keep_their_type(taken):
    class Full(Exception):
        pass

    def pack(tensor):
        raise Full

    tensors = case((5,), 7, 4, 3, torch.float32, grad=("x", "lora_B"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pytest.raises(Full):
        ops.lora_linear(**tensors)
    assert not taken
    ops.lora_linear(**tensors).sum().backward()
    assert len(taken) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, taken):
    tensors = case((5,), 7, 4, 3, torch.float64, grad=("x", "lora_B"))

    def twice(x):
        return ops.lora_linear(**{**tensors, "x": ops.lora_linear(**{**tensors, "x": x})[:, :1] * x})

    want = torch.autograd.grad(twice(tensors["x"]).sum(), (tensors["x"], tensors["lora_B"]))
    assert len(taken) == 2
    checkpoint(twice, tensors["x"], use_reentrant=reentrant).sum().backward()
    assert len(taken) == (6 if reentrant else 5)  # the second call of the recomputation stops once all is saved
    torch.testing.assert_close((tensors["x"].grad, tensors["lora_B"].grad), want, rtol=0, atol=0)


def test_calls_that_stay_in_python(taken, monkeypatch):
    tensors = case((5,), 7, 4, 3, torch.float32, grad=("x", "lora_B"))

    class Other(torch.Tensor):
        pass

    ops.lora_linear(**{**tensors, "x": tensors["x"].detach().as_subclass(Other)})
    ops.lora_linear(**{name: t.detach().to("meta") for name, t in tensors.items()})
    with pytest.raises(ValueError, match="expected x"):
        ops.lora_linear(**{**tensors, "x": tensors["x"][:, 1:]})
    with pytest.raises(TypeError, match="expected the same dtype"):
        ops.lora_linear(**{**tensors, "x": tensors["x"].double()})
    got, want = (
        torch.func.vmap(lambda x, op=op: op(**{**tensors, "x": x}))(tensors["x"][None])
        for op in (ops.lora_linear, ops.lora_linear_reference)
    )
    torch.testing.assert_close(got, want)
    ops.lora_linear(**tensors, dropout=0.5)
    ops.lora_linear(**{**tensors, "weight": tensors["weight"].clone().requires_grad_()})
    detached = {name: t.detach() for name, t in tensors.items()}
    with torch._subclasses.FakeTensorMode() as mode:
        ops.lora_linear(**{name: mode.from_tensor(t) for name, t in detached.items()})
    for backend in ("torch", "triton"):
        monkeypatch.setenv("LORA_NULL_LINEAR_BACKEND", backend)
        ops.lora_linear(**tensors)
    assert not taken
    monkeypatch.setenv("LORA_NULL_LINEAR_BACKEND", "cublas")
    ops.lora_linear(**tensors)
    assert len(taken) == 1


def test_only_a_measured_kernel_takes_a_call_on_a_gpu_from_cpp(monkeypatch):
    times = [{"product": "backward_dy", "dtype": "bfloat16", "T": 8192, "d": 4096, "m": 4096, "r": 16,
              "triton_us": 1.0, "cublas_us": 2.0}]  # fmt: skip
    monkeypatch.setattr(dispatch.config, "architecture", lambda device: "sm_90 a card")

    def reason(T):
        x = SimpleNamespace(is_cuda=True, device="cuda", shape=(T, 4096), numel=lambda: T * 4096, dtype=torch.bfloat16)
        weight, B = torch.empty(4096, 4096, device="meta"), torch.empty(4096, 16, device="meta")
        dispatch._choose.cache_clear()
        return dispatch._reason_against_compiled(x, weight, B, 0.0)

    assert reason(8192) is None, "nothing is measured"
    monkeypatch.setattr(dispatch, "measured_times", lambda arch: times)
    assert "measurements give" in reason(8192) and reason(1024) is None
    monkeypatch.setenv("LORA_NULL_LINEAR_BACKEND", "cublas")
    assert reason(8192) is None
    dispatch._choose.cache_clear()
