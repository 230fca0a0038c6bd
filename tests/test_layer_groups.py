"""Layers that read one tensor share its projection: same values, once per tensor, and nothing left behind."""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_null
from lora_null.layers import attach_adapter, detach_adapter
from lora_null.ops import vendor
from lora_null.projection_groups import share_projections

D, M, R = 24, 20, 4


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are slower on two threads, and much slower beside another process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Attention(nn.Module):
    """q, k and v read x; o reads something else."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        for name, m in (("q", M), ("k", 12), ("v", 12)):
            setattr(self, name, nn.Linear(D, m, bias=name == "q", dtype=dtype))
        self.o = nn.Linear(M, D, bias=False, dtype=dtype)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + self.o(q * torch.cat([k, v[..., : M - 12]], -1))


def null_space_adapters(model, dtype=None, dropout=0.0, seed=0):
    """Frozen factors of the form that the initialisation gives: ``A_i = sqrt(D_i) R_i^T U^T`` per parent module."""
    g = torch.Generator().manual_seed(seed)
    for parent in [m for m in model.modules() if isinstance(m, Attention)]:
        shared = torch.linalg.qr(torch.randn(D, R, generator=g, dtype=torch.float64))[0]
        for name in "qkvo":
            linear = getattr(parent, name)
            basis = shared
            if name == "o":
                basis = torch.linalg.qr(torch.randn(M, R, generator=g, dtype=torch.float64))[0]
            rotation = torch.linalg.qr(torch.randn(R, R, generator=g, dtype=torch.float64))[0]
            lengths = torch.logspace(0, -4, R, dtype=torch.float64).sqrt()
            lora_A = lengths[:, None] * (rotation @ basis.t())
            lora_B = torch.randn(linear.out_features, R, generator=g, dtype=torch.float64)
            kind = dtype or linear.weight.dtype
            attach_adapter(linear, lora_A.to(kind), lora_B.to(kind), scaling=0.5, lora_dropout=dropout)
    return model


@pytest.fixture
def projections(monkeypatch):
    """Shapes of the projections that were computed."""
    seen = []
    project = vendor.project

    def counting(x, lora_As, **options):
        seen.append((tuple(x.shape), len(lora_As)))
        return project(x, lora_As, **options)

    monkeypatch.setattr(vendor, "project", counting)
    return seen


def pair(layers=1, dtype=torch.float64, factor_dtype=None, **options):
    """The same model without and with sharing."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Attention(dtype) for _ in range(layers)])
    plain = null_space_adapters(model, factor_dtype, **options)
    shared = copy.deepcopy(plain)
    assert share_projections(shared) == layers
    return plain, shared


def tokens(*lead, dtype=torch.float64, grad=True):
    x = torch.randn(*lead, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x.to(dtype).requires_grad_(grad)


def gradients(model, x, forward=None):
    model.zero_grad()
    leaf = x.detach().requires_grad_(x.requires_grad)
    y = (forward or model)(leaf)
    y.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad} | found


def assert_same(got, want, **tolerance):
    assert set(got) == set(want)
    for name, value in want.items():
        if value is not None:
            torch.testing.assert_close(got[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def group_of(model):
    return model[0].q.projection_group


def test_same_values_and_gradients_with_one_projection(projections):
    plain, shared = pair(layers=2)
    x = tokens(2, 5)
    want = gradients(plain, x)
    assert len(projections) == 2 * 4
    projections.clear()
    got = gradients(shared, x)
    assert len(projections) == 2 * 2
    assert_same(got, want, rtol=1e-10, atol=1e-10)
    assert {name.split(".", 1)[1] for name in got if name not in ("x", "y")} == {
        f"{name}.lora_B.weight" for name in "qkvo"
    }


@pytest.mark.parametrize("dtype, factor_dtype", [(torch.float32, None), (torch.bfloat16, torch.float32)], ids=str)
def test_sharing_is_as_exact_as_not_sharing(dtype, factor_dtype):
    plain, shared = pair(dtype=dtype, factor_dtype=factor_dtype)
    x = tokens(64, dtype=dtype)
    truth = gradients(copy.deepcopy(plain).double(), x.detach().double().requires_grad_())
    own, got = gradients(plain, x), gradients(shared, x)
    for name, want in truth.items():
        size = want.norm()
        error, own_error = ((found[name].double() - want).norm() / size for found in (got, own))
        # U, M and B M are three more roundings, of fp32 factors.
        slack = 3 * torch.finfo(torch.float32).eps
        assert error <= 2 * own_error + slack, f"{name}: {error:.3g}, unshared {own_error:.3g}"


def test_nothing_is_left_after_a_pass():
    _, shared = pair()
    x = tokens(5)
    y = shared(x)
    assert group_of(shared)._entry is None
    y.sum().backward()
    dead = weakref.ref(x)
    del x, y
    assert dead() is None


def test_an_abandoned_projection_dies_with_x():
    _, shared = pair()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            x = tokens(5) * 1.0
            shared[0].q(x)
        entry = group_of(shared)._entry
        assert entry is not None
        projected = weakref.ref(entry.projected)
        del entry, x
        gc.collect()
        assert group_of(shared)._entry is None and projected() is None


def test_a_failing_layer_leaves_no_wrong_projection(projections):
    plain, shared = pair()
    x = tokens(5)
    handle = shared[0].k.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shared(x)
    handle.remove()
    with torch.no_grad():
        x.mul_(2)
    projections.clear()
    assert_same(gradients(shared, x), gradients(plain, x), rtol=1e-10, atol=1e-10)


def test_a_changed_tensor_is_projected_again():
    plain, shared = pair()
    with torch.no_grad():
        x = tokens(5, grad=False)
        shared[0].q(x)
        x.add_(1)
        torch.testing.assert_close(shared[0].k(x), plain[0].k(x))
        x.requires_grad_()
        shared[0].q(x)
    assert shared[0].k(x).requires_grad
    torch.autograd.grad(shared[0].k(x).sum(), x)


def test_gradient_mode_and_views_are_told_apart(projections):
    plain, shared = pair()
    x = tokens(5)
    with torch.no_grad():
        shared[0].q(x)
    y = shared[0].k(x)
    alias = x[:]
    z = shared[0].v(alias)
    assert len(projections) == 3
    want = torch.autograd.grad(plain[0].k(x).sum() + plain[0].v(x).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(y.sum() + z.sum(), x)[0], want)


def test_evaluation_shares_and_inference_mode_does_not(projections):
    plain, shared = pair()
    x = tokens(5, grad=False)
    with torch.no_grad():
        want = plain(x)
        projections.clear()
        torch.testing.assert_close(shared(x), want)
        assert len(projections) == 2
    projections.clear()
    with torch.inference_mode():
        torch.testing.assert_close(shared(x * 1.0), want)
    assert len(projections) == 4


def test_the_same_layer_twice_and_any_order():
    plain, shared = pair()

    def forward(model):
        block = model[0]
        return lambda x: torch.cat([block.v(x), block.q(x), block.v(x), block.k(x), block.q(x)], -1)

    x = tokens(5)
    assert_same(gradients(shared, x, forward(shared)), gradients(plain, x, forward(plain)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, projections):
    plain, shared = pair(layers=3)
    x = tokens(2, 5)
    want = gradients(plain, x)

    def forward(x):
        for block in shared:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    projections.clear()
    assert_same(gradients(shared, x, forward), want, rtol=1e-10, atol=1e-10)
    assert len(projections) == 3 * 2 * 2
    assert all(block.q.projection_group._entry is None for block in shared)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", ["q", "k", "kv"])
def test_a_projection_never_crosses_the_border_of_a_checkpoint(reentrant, inside):
    plain, shared = pair()

    def forward(model, mark):
        def apply(name, x):
            layer = getattr(model[0], name)
            return checkpoint(layer, x, use_reentrant=reentrant) if mark and name in inside else layer(x)

        return lambda x: torch.cat([apply(name, x) for name in "qkv"], -1)

    x = tokens(5)
    want = gradients(plain, x, forward(plain, False))
    assert_same(gradients(shared, x, forward(shared, True)), want, rtol=1e-10, atol=1e-10)


def test_too_few_tokens_to_pay_for_the_folding_are_not_shared(projections):
    # (n - 1) T d > r sum(m): 2 * T * 24 > 4 * 44 from T = 4 on
    shared = pair()[1]
    for count, expected in ((3, 3), (4, 1)):
        projections.clear()
        shared(tokens(count))
        assert sum(shape == (count, D) for shape, _ in projections) == expected
    group = group_of(shared)
    detach_adapter(shared[0].v)
    assert (group.size, group.out_features) == (2, 32)


def test_dropout_switches_sharing_off(projections):
    _, shared = pair(dropout=0.5)
    shared(tokens(5))
    assert len(projections) == 4
    projections.clear()
    shared.eval()(tokens(5))
    assert len(projections) == 2


def test_disabled_adapters_and_trained_factors_do_not_share(projections):
    plain, shared = pair()
    shared[0].k.adapter_enabled = plain[0].k.adapter_enabled = False
    shared[0].v.lora_A.weight.requires_grad_()
    plain[0].v.lora_A.weight.requires_grad_()
    x = tokens(5)
    want = gradients(plain, x)
    projections.clear()
    assert_same(gradients(shared, x), want, rtol=1e-10, atol=1e-10)
    assert len(projections) == 3


def test_groups_are_not_part_of_the_model_s_state():
    plain, shared = pair()
    assert list(shared.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in shared.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert [n for n, _ in shared.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(dict(shared.named_modules())) == list(dict(plain.named_modules()))


def test_copies_and_pickles_share_among_themselves(projections):
    plain, shared = pair()
    x = tokens(5)
    shared[0].q(x)
    buffer = io.BytesIO()
    torch.save(shared, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(shared), torch.load(buffer, weights_only=False)):
        assert twin[0].q.projection_group is twin[0].k.projection_group
        assert twin[0].q.projection_group is not shared[0].q.projection_group
        assert twin[0].q.projection_group._entry is None
        want = gradients(plain, x)
        projections.clear()
        assert_same(gradients(twin, x), want, rtol=1e-10, atol=1e-10)
        assert len(projections) == 2


def test_a_converted_model_still_shares(projections):
    _, shared = pair()
    shared(tokens(5))
    projections.clear()
    shared.float()(tokens(5, dtype=torch.float32))
    assert len(projections) == 2


def test_loading_other_factors_is_noticed(caplog, projections):
    plain, shared = pair()
    x = tokens(5)
    shared(x)
    other = torch.randn(R, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    state = plain.state_dict()
    state["0.k.lora_A.weight"] = other
    for model in (plain, shared):
        model.load_state_dict(state)
    want = gradients(plain, x)
    projections.clear()
    assert_same(gradients(shared, x), want, rtol=1e-10, atol=1e-10)
    assert len(projections) == 3
    assert share_projections(shared) == 1
    assert shared[0].k.projection_group is None


def test_factors_that_change_at_every_call_end_the_sharing(projections):
    plain, shared = pair()
    for _ in range(20):
        with torch.no_grad():
            for model in (plain, shared):
                model[0].q.lora_A.weight.mul_(1.0)
        x = tokens(5)
        shared(x)
    projections.clear()
    shared(x)
    assert len(projections) == 4


def test_autocast(projections):
    plain, shared = pair(dtype=torch.float32)
    x = tokens(33, dtype=torch.float32)
    truth = gradients(copy.deepcopy(plain).double(), x.detach().double().requires_grad_())

    def cast(model):
        def forward(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        return forward

    own = gradients(plain, x, cast(plain))
    projections.clear()
    got = gradients(shared, x, cast(shared))
    assert len(projections) == 2
    for name, want in truth.items():
        errors = [(found[name].double() - want).norm() / want.norm() for found in (got, own)]
        assert errors[0] <= 2 * errors[1], f"{name}: {errors[0]:.3g}, unshared {errors[1]:.3g}"


def test_threads_do_not_mix_projections():
    plain, shared = pair()
    inputs = [torch.full((7, D), float(i), dtype=torch.float64) for i in range(4)]
    with torch.no_grad():
        want = [plain(x) for x in inputs]
    wrong = []

    def work(index):
        with torch.no_grad():
            for _ in range(50):
                if not torch.allclose(shared(inputs[index]), want[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_models_keep_their_gradients():
    plain, shared = pair()
    x = tokens(5)
    want = gradients(plain, x)
    torch._dynamo.reset()
    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    assert_same(gradients(shared, x, compiled), want, rtol=1e-10, atol=1e-10)
    assert group_of(shared)._entry is None


CALLS = st.tuples(
    st.sampled_from("qkv"),
    st.integers(0, 1),  # which tensor
    st.sampled_from(["plain", "plain", "no_grad", "checkpoint", "autocast", "view", "change first"]),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(CALLS, min_size=1, max_size=8))
def test_any_sequence_of_calls_gives_what_unshared_layers_give(calls):
    plain, shared = pair()
    results = []
    for model in (plain, shared):
        leaves = [tokens(3), tokens(3) * 0.5]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        inputs, outputs = [leaf * 1.0 for leaf in leaves], []
        for name, which, how in calls:
            layer, x = getattr(model[0], name), inputs[which]
            if how == "no_grad":
                with torch.no_grad():
                    layer(x)
            elif how == "checkpoint":
                outputs.append(checkpoint(layer, x, use_reentrant=False))
            elif how == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    outputs.append(layer(x))
            else:
                # A tensor that a checkpoint will recompute from must stay as it was, with any layer.
                if how == "change first" and not any((w, h) == (which, "checkpoint") for _, w, h in calls):
                    x.add_(1.0)
                outputs.append(layer(x[:] if how == "view" else x))
        if outputs:
            sum(y.sum() for y in outputs).backward()
        adapters = [getattr(model[0], name).lora_B.weight.grad for name in "qkv"]
        results.append([*outputs, *[leaf.grad for leaf in leaves], *adapters])
    for got, want in zip(results[1], results[0], strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_initialised_and_loaded_models_share(calibrated, llama, tmp_path):
    model, covariances = calibrated
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=4), progress=False)
    lora_null.save_adapter(model, tmp_path / "adapter")
    loaded = lora_null.load_adapter(llama(), tmp_path / "adapter", is_trainable=True)
    for adapted in (model, loaded):
        block = adapted.model.layers[0]
        sizes = [getattr(p, "size", None) for p in (layer.projection_group for layer in block.self_attn.children())]
        assert sizes == [3, 3, 3, None]
        assert block.mlp.gate_proj.projection_group is block.mlp.up_proj.projection_group is not None
        assert block.mlp.down_proj.projection_group is None
    merged = lora_null.merge(model)
    assert all("projection_group" not in vars(module) for module in merged.modules())
