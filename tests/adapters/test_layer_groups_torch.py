"""Shared projections under checkpointing, autocast, compilation, threads, copies and changes of the factors."""

import copy
import io
import threading

import pytest
import torch
from group_tools import D, R, assert_same, gradients, group_of, pair, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_null
from lora_null.adapters.layer import attach_adapter, detach_adapter
from lora_null.adapters.projection import row_space_coordinates
from lora_null.adapters.sharing import share_projections

# Matrices this small are slower on two threads, and much slower beside another process.
pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_loading_another_first_factor_is_noticed(caplog, projections):
    """Its rows are what the others' are expressed in."""
    plain, shared = pair()
    x = tokens(5)
    shared(x)
    state = plain.state_dict()
    state["0.q.lora_A.weight"] = torch.randn(R, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for model in (plain, shared):
        model.load_state_dict(state)
    want = gradients(plain, x)
    projections.clear()
    assert_same(gradients(shared, x), want, rtol=1e-10, atol=1e-10)
    assert len(projections) == 4
    assert share_projections(shared) == 1
    assert shared[0].q.projection_group is None and shared[0].k.projection_group is shared[0].v.projection_group
    projections.clear()
    assert_same(gradients(shared, x), want, rtol=1e-10, atol=1e-10)
    assert len(projections) == 3


def test_factors_that_change_between_two_layers():
    plain, shared = pair()
    x = tokens(5, grad=False)
    with torch.no_grad():
        shared[0].q(x)
        for model in (plain, shared):
            model.load_state_dict({n: v * 2 if "lora_A" in n else v for n, v in model.state_dict().items()})
        torch.testing.assert_close(shared[0].k(x), plain[0].k(x))


def test_factors_in_the_memory_of_former_ones():
    """After two changes through .data, address and version of a factor often are those of the first."""
    d = 2**19
    model, first = nn.Module(), torch.randn(1, d, generator=torch.Generator().manual_seed(5))
    for name in "qk":
        model.add_module(name, nn.Linear(d, 1, bias=False))
        attach_adapter(getattr(model, name), first.clone(), torch.ones(1, 1))
    assert share_projections(model) == 1
    x, lora_A = torch.ones(1, d), model.k.lora_A.weight
    with torch.no_grad():
        for _ in range(5):
            model.q(x)
            torch.testing.assert_close(model.k(x), x @ (model.k.weight + lora_A).T, rtol=1e-3, atol=1e-2)
            for _ in range(2):
                lora_A.data = lora_A.data * 2


def test_a_trained_or_removed_first_factor_ends_the_sharing(projections):
    plain, shared = pair()
    x = tokens(5)
    for model in (plain, shared):
        model[0].q.lora_A.weight.requires_grad_()
    want = gradients(plain, x)
    projections.clear()
    assert_same(gradients(shared, x), want, rtol=1e-10, atol=1e-10)
    assert len(projections) == 4
    detach_adapter(shared[0].q), detach_adapter(plain[0].q)
    for twin in (shared, copy.deepcopy(shared)):
        projections.clear()
        assert_same(gradients(twin, x), gradients(plain, x), rtol=1e-10, atol=1e-10)
        assert len(projections) == 3 + 3
    assert share_projections(shared) == 1


def test_rows_that_are_nearly_dependent_are_not_shared():
    """Roundings of the projection would grow by the condition of its rows."""
    first = torch.eye(R, D, dtype=torch.float64)
    mixing = torch.randn(R, R, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(row_space_coordinates(mixing @ first, first * 1e-3).double(), mixing * 1e3)
    for column in (first[0] + 1e-3 * first[1], torch.zeros(D, dtype=torch.float64)):
        near = first.clone()
        near[1] = column
        assert row_space_coordinates(mixing @ near, near) is None


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


def test_factors_that_change_at_every_call_do_not_upset_checkpointing():
    """The recomputation of a block must save what its first run has saved, also when sharing is being given up."""
    plain, shared = pair()
    x = tokens(2, 5)
    want = gradients(plain, x)
    layers = [shared[0].q, shared[0].k, shared[0].v]

    def swap(*_):
        for layer in layers:
            layer.lora_A.weight.data = layer.lora_A.weight.data.clone()

    # as sharding libraries do: other memory for the same parameters
    shared[0].register_forward_pre_hook(swap)
    for _ in range(6):
        got = gradients(shared, x, lambda x: checkpoint(shared[0], x, use_reentrant=False))
        assert_same(got, want, rtol=1e-10, atol=1e-10)


def test_a_replaced_parameter_is_not_taken_for_the_factor(projections):
    """FSDP2 and offloading swap a copy in for each forward; what it holds is known by reading it only."""
    _, shared = pair()
    for layer in (shared[0].q, shared[0].k, shared[0].v):
        layer.lora_A.weight = nn.Parameter(layer.lora_A.weight.detach().clone(), requires_grad=False)
    shared(tokens(5))
    assert len(projections) == 4
    assert share_projections(shared) == 1
    projections.clear()
    shared(tokens(5))
    assert len(projections) == 2


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


def test_groups_are_not_part_of_the_model_s_state():
    plain, shared = pair()
    assert list(shared.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in shared.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert [n for n, _ in shared.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(dict(shared.named_modules())) == list(dict(plain.named_modules()))


def test_initialised_and_loaded_models_share(calibrated, llama, tmp_path):
    model, covariances = calibrated
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=4, train="b"), progress=False)
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
