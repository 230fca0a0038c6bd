"""Layers that read one tensor share its projection: same values, once per tensor, and nothing left behind."""

import copy
import gc
import weakref

import pytest
import torch
from group_tools import D, assert_same, gradients, group_of, pair, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from lora_null.adapters.layer import detach_adapter
from lora_null.adapters.projection import row_space_coordinates
from lora_null.adapters.sharing import share_projections

# Matrices this small are slower on two threads, and much slower beside another process.
pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_rounded_to_half_precision_are_not_shared_at_the_cost_of_the_null_space(dtype):
    """What rounding adds to a factor sees activations that are much larger outside of the null space."""
    plain, shared = pair(dtype=torch.float32)
    space = torch.linalg.qr(plain[0].q.lora_A.weight.double().T)[0]
    x = tokens(64, grad=False)
    x = (x - 0.99 * x @ space @ space.T).to(dtype)
    for model in (plain, shared):
        with torch.no_grad():
            for layer in (model[0].q, model[0].k):
                layer.weight.zero_()
                layer.bias = None
        model.to(dtype)
    share_projections(shared)
    truth = copy.deepcopy(plain).double()[0].k(x.double())
    shared[0].q(x)
    error, own = ((model[0].k(x).double() - truth).norm() for model in (shared, plain))
    assert error <= 2 * own


def test_factors_of_very_different_lengths_in_fp16():
    plain, shared = pair(dtype=torch.float32)
    for model in (plain, shared):
        with torch.no_grad():
            model[0].q.lora_A.weight.mul_(1e-4)
        for layer in (model[0].q, model[0].k):
            layer.weight.data = layer.weight.half()
        model[0].q.bias.data = model[0].q.bias.half()
    assert share_projections(shared) == 1
    x = tokens(64).half()
    truth = copy.deepcopy(plain).double()[0].k(x.double())
    shared[0].q(x)
    error, own = ((model[0].k(x).double() - truth).norm() for model in (shared, plain))
    assert error <= 2 * own


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


@pytest.mark.parametrize("grad", [True, False])
def test_a_backward_between_two_layers(grad):
    """Its graph is gone; and without a gradient of x, there is none of P."""
    plain, shared = pair()
    results = []
    for model in (plain, shared):
        x = tokens(5, grad=grad)
        for layer in (model[0].q, model[0].k):
            layer(x).square().sum().backward()
        results.append({"x": x.grad, "q": model[0].q.lora_B.weight.grad, "k": model[0].k.lora_B.weight.grad})
    assert_same(*results, rtol=1e-10, atol=1e-10)
    assert shared[0].q(tokens(5, grad=False)).requires_grad
    assert group_of(shared)._entry is None or not group_of(shared)._entry.projected.requires_grad


@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_whose_output_is_not_used_gets_no_gradient(grad):
    plain, shared = pair()
    for model in (plain, shared):
        x = tokens(5, grad=grad)
        model[0].q(x)
        model[0].k(x).square().sum().backward()
        assert model[0].q.lora_B.weight.grad is None and model[0].q.bias.grad is None


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


def test_too_few_tokens_to_pay_for_the_folding_are_not_shared(projections):
    # 2 (n - 1) T d > 3 r (m_k + m_v): 96 T > 288 from T = 4 on
    shared = pair()[1]
    for count, expected in ((3, 3), (4, 1)):
        projections.clear()
        shared(tokens(count))
        assert projections.count((count, D)) == expected
    group = group_of(shared)
    detach_adapter(shared[0].v)
    assert (group.size, group._folded_features) == (2, 12)
    # 48 T > 144
    for count, expected in ((3, 2), (4, 1)):
        projections.clear()
        shared[0].q(x := tokens(count))
        shared[0].k(x)
        assert len(projections) == expected


def test_rows_too_short_to_be_expressed_in():
    first = torch.eye(4, D)
    assert row_space_coordinates(first, first * 1e-40) is None


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


@torch.no_grad()
def test_a_factor_that_is_gone_when_its_layer_has_run():
    """ZeRO-3 keeps the values of a parameter only while its own layer runs."""
    plain, shared = pair()
    q, x = shared[0].q, tokens(2, 5)
    factor, whole = q.lora_A.weight, q.lora_A.weight.data
    q.register_forward_pre_hook(lambda *_: setattr(factor, "data", whole))
    q.register_forward_hook(lambda *_: setattr(factor, "data", whole.new_empty(0)))
    torch.testing.assert_close(shared(x), plain(x), rtol=1e-10, atol=1e-10)
