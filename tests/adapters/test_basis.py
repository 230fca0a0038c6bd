"""A factor that learns within its free directions: gradients, containment, when A is made, and what is left behind."""

import copy
import pickle

import pytest
import spectra
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_null import factorize, null_basis, null_space, ops
from lora_null.adapters.basis import BasisFactor, FreeDirections
from lora_null.adapters.layer import attach_adapter

D, M, R = 40, 24, 5
# Shares of energy that hold the complement and the basis.
FORMS = {"complement": 0.8, "basis": 0.97}


def problem(form, dtype=torch.float32, held=None):
    """Return the covariance's null basis, a linear layer and a factor that starts at LoRA-Null's ``A0``."""
    C, _ = spectra.with_spectrum(spectra.power(D, 1.2))
    free = null_basis(C, FORMS[form])
    assert (free.complement is not None) == (form == "complement")
    torch.manual_seed(0)
    linear = nn.Linear(D, M, dtype=dtype)
    A0, _ = factorize(linear.weight, null_space(C, R).basis, dtype=dtype)
    return free, linear, BasisFactor(A0, FreeDirections(free, dtype=held or dtype)), A0


def adapted(linear, factor, dtype=torch.float32):
    layer = attach_adapter(linear, torch.zeros(R, D, dtype=dtype), torch.zeros(M, R, dtype=dtype), scaling=0.7)
    layer.lora_A = factor
    return layer


def batch(seed, dtype=torch.float32, tokens=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(tokens, M, generator=generator, dtype=torch.float64).to(dtype)


def train(layer, steps, optimizer=None, micro=1, run=None):
    run = layer if run is None else run
    optimizer = optimizer or torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        for part in range(micro):
            x, y = batch(100 * step + part, layer.lora_B.weight.dtype)
            (run(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def products(monkeypatch):
    """Count how often A is made."""
    made = []
    expand = FreeDirections.expand
    monkeypatch.setattr(FreeDirections, "expand", lambda self, C: made.append(1) or expand(self, C))
    return made


@pytest.mark.parametrize("form", FORMS)
def test_starts_at_the_null_space(form):
    free, _, factor, A0 = problem(form)
    torch.testing.assert_close(factor.weight.detach(), A0, atol=1e-6, rtol=0)
    assert factor.coefficients.shape == (R, free.k if form == "basis" else D)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_against_finite_differences(form):
    _, linear, factor, _ = problem(form, torch.float64)
    x, y = batch(0, torch.float64)
    B = torch.randn(M, R, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss():
        return (ops.lora_linear(x, linear.weight, factor.weight, B, scaling=0.7) - y).square().sum()

    loss().backward()
    C, step = factor.coefficients, 1e-5
    with torch.no_grad():
        for index in [(0, 0), (2, 3), (R - 1, C.shape[1] - 1)]:
            value = C[index].item()
            ends = []
            for C[index] in (value + step, value - step):
                ends.append(loss().item())
            C[index] = value
            assert C.grad[index].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_the_plain_product(form):
    _, linear, factor, _ = problem(form)
    x, y = batch(0)
    B = torch.ones(M, R)
    (ops.lora_linear(x, linear.weight, factor.weight, B) - y).square().sum().backward()
    C = factor.coefficients.detach().double().requires_grad_()
    A = factor.directions.expand(C)
    (x.double() @ linear.weight.double().mT + (x.double() @ A.mT) @ B.double().mT - y).square().sum().backward()
    torch.testing.assert_close(
        factor.coefficients.grad.double(), C.grad, rtol=1e-5, atol=1e-5 * float(C.grad.abs().max())
    )


# Leak: the part of A in the protected directions, by the dtype of C and of the basis held. 2^-9 is bf16's rounding.
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "held", "least", "most"),
    [
        (torch.float64, torch.float64, 0, 1e-12),
        (torch.float32, torch.float32, 0, 3e-7),
        (torch.float32, torch.bfloat16, 1e-4, 2**-8),
    ],
    ids=["fp64", "fp32", "basis-bf16"],
)
def test_containment_after_100_steps_of_adam(form, dtype, held, least, most):
    free, linear, factor, A0 = problem(form, dtype, held)
    layer = adapted(linear, factor, dtype)
    train(layer, 100)
    moved = float((layer.lora_A.weight.detach() - A0).norm() / A0.norm())
    assert moved > 0.5, "nothing was learned"
    leak = free.leak(layer.lora_A.weight)
    assert least <= leak <= most
    # And so does the update: its part on what is protected.
    assert free.leak(layer.lora_B.weight @ layer.lora_A.weight) <= 2 * most


@pytest.mark.parametrize("form", FORMS)
def test_made_once_per_step(form, products):
    _, linear, factor, _ = problem(form)
    layer = adapted(linear, factor)
    layer.lora_B.weight.data.fill_(0.1)  # from zero, the first step would leave the coefficients as they are
    products.clear()
    train(layer, 3, micro=4)
    assert len(products) == 3
    with torch.no_grad():
        layer.eval()(batch(0)[0])
        layer(batch(1)[0])
    assert len(products) == 4


def test_micro_batches_give_the_gradient_of_the_whole():
    grads = []
    for parts in (1, 4):
        _, linear, factor, _ = problem("basis", torch.float64)
        layer = adapted(linear, factor, torch.float64)
        layer.lora_B.weight.data.fill_(0.1)
        x, y = batch(0, torch.float64)
        for rows, want in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (layer(rows) - want).square().sum().backward()
        grads.append(factor.coefficients.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


WRITES = {
    "in-place": lambda C: C.copy_(2 * C),
    "data": lambda C: C.data.mul_(2),
    "set-data": lambda C: setattr(C, "data", 2 * C.data),
    "numpy": lambda C: C.detach().numpy().__imul__(2),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_way_of_writing_is_seen(write):
    _, _, factor, _ = problem("basis")
    before = factor.weight.detach().clone()
    with torch.no_grad():
        WRITES[write](factor.coefficients)
    torch.testing.assert_close(factor.weight.detach(), 2 * before)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_every_kind_of_optimizer_step_is_seen(options):
    _, linear, factor, _ = problem("basis")
    layer = adapted(linear, factor)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2, **options)
    train(layer, 3, optimizer)
    torch.testing.assert_close(factor.weight.detach(), factor.coefficients.detach() @ factor.directions.held.mT)


def test_inference_mode_leaves_nothing_that_training_cannot_use():
    _, linear, factor, _ = problem("basis")
    layer = adapted(linear, factor)
    with torch.inference_mode():
        layer(batch(0)[0])
    train(layer, 2)


def test_autocast_does_not_round_the_product():
    free, linear, factor, _ = problem("basis")
    layer = adapted(linear, factor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.lora_B.weight.data.fill_(0.1)
        x, y = batch(0)
        loss = (layer(x) - y).square().mean()
        loss.backward()
        assert layer.lora_A.weight.dtype == torch.float32 and free.leak(layer.lora_A.weight) < 1e-6
    assert factor.coefficients.grad.dtype == torch.float32 and bool(factor.coefficients.grad.any())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, products):
    grads = []
    for checkpointed in (False, True):
        _, linear, factor, _ = problem("basis")
        layer = adapted(linear, factor)
        layer.lora_B.weight.data.fill_(0.1)
        x, y = batch(0)
        products.clear()
        x.requires_grad_()
        out = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        (out - y).square().mean().backward()
        assert len(products) == 1
        grads.append(factor.coefficients.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_in_one_graph_and_fresh_after_every_step(form):
    results = []
    for compiled in (False, True):
        _, linear, factor, _ = problem(form)
        layer = adapted(linear, factor)
        torch._dynamo.reset()
        train(layer, 4, run=torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)
        results.append((factor.weight.detach(), layer.lora_B.weight.detach()))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-4, atol=1e-5)


def test_functional_transforms():
    _, linear, factor, _ = problem("basis", torch.float64)
    layer = adapted(linear, factor, torch.float64)
    layer.lora_B.weight.data.fill_(0.1)
    x, y = batch(0, torch.float64)
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters):
        return (torch.func.functional_call(layer, parameters, (x,)) - y).square().mean()

    found = torch.func.grad(loss)(trained)
    loss(dict(layer.named_parameters())).backward()
    torch.testing.assert_close(found["lora_A.coefficients"], factor.coefficients.grad)
    by_x = torch.func.vmap(torch.func.grad(lambda row: layer(row).square().sum()))(x)
    (wanted,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)
    torch.testing.assert_close(by_x, wanted)


def test_copies_share_their_directions_and_nothing_else():
    _, linear, factor, A0 = problem("basis")
    other = BasisFactor(A0, factor.directions)
    pair = nn.ModuleList([adapted(linear, factor), other])
    factor.weight.sum().backward()
    copied = copy.deepcopy(pair)
    assert copied[0].lora_A.directions is copied[1].directions is not factor.directions
    loaded = pickle.loads(pickle.dumps(pair))
    for twin in (copied, loaded):
        with torch.no_grad():
            twin[0].lora_A.coefficients.mul_(2)
        torch.testing.assert_close(twin[0].lora_A.weight, 2 * factor.weight)
        train(twin[0], 1)


def test_state_dict_holds_the_coefficients_and_what_they_make():
    _, linear, factor, _ = problem("basis")
    layer = adapted(linear, factor)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A.coefficients", "lora_A.weight", "lora_B.weight"}
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A.coefficients", "lora_B.weight"}
    assert not list(layer.buffers())
    train(layer, 3)
    _, linear, fresh, _ = problem("basis")
    restored = adapted(linear, fresh)
    assert not torch.equal(fresh.weight, factor.weight)
    restored.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.weight, factor.weight)


def test_moved_and_cast_with_its_layer():
    free, linear, factor, _ = problem("basis")
    layer = adapted(linear, factor).to(torch.bfloat16)
    assert factor.weight.dtype == torch.bfloat16 and factor.directions.held.dtype == torch.float32
    # From bf16 coefficients A is made in fp32 and rounded once.
    assert free.leak(factor.weight) < 2**-8
    layer.to("meta")
    assert factor.directions.held.device.type == "cpu"


def test_put_takes_what_lies_in_the_free_directions_and_nothing_else():
    free, linear, factor, _ = problem("basis")
    layer = adapted(linear, factor)
    train(layer, 5)
    wanted = factor.weight.detach().clone()
    _, _, fresh, start = problem("basis")
    fresh.put(wanted)
    torch.testing.assert_close(fresh.weight.detach(), wanted, atol=1e-6, rtol=0)
    kept = fresh.coefficients.detach().clone()
    outside = torch.randn(R, D, generator=torch.Generator().manual_seed(0))
    for bad, message in (
        (outside, rf"outside the {free.k} free directions by .*expected at most 0\.016.*other covariances"),
        (wanted[:, :-1], rf"shape \(5, 39\); expected \(r, {D}\).*another layer"),
        (wanted[:-1], r"shape \(4, 40\); expected 5 rows.*another rank"),
    ):
        with pytest.raises(ValueError, match=message):
            fresh.put(bad)
        assert torch.equal(fresh.coefficients, kept)
    with pytest.raises(ValueError, match="outside the"):
        BasisFactor(outside, factor.directions)
    with pytest.raises(ValueError, match=r"outside the .* by nan"):
        BasisFactor(start * torch.nan, factor.directions)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_cuda(form, products):
    class ThroughData(torch.optim.SGD):
        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.data.sub_(0.1 * p.grad)

    free, linear, factor, _ = problem(form)
    layer = adapted(linear, factor).cuda()
    layer.lora_B.weight.data.fill_(0.1)
    allowed = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        products.clear()
        optimizer = ThroughData([p for p in layer.parameters() if p.requires_grad])
        for step in range(20):
            for part in range(3):
                x, y = batch(100 * step + part)
                (layer(x.cuda()) - y.cuda()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(products) == 20
    finally:
        torch.backends.cuda.matmul.fp32_precision = allowed
    assert free.leak(factor.weight.cpu()) < 3e-7 and factor.directions.held.is_cuda
    torch.testing.assert_close(factor.weight, factor.directions.expand(factor.coefficients))
