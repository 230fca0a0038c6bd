"""What a calibration shares and what it leaves behind: groups of layers, the model's state, NaN."""

import pytest
import torch
from calibration_tools import VOCABULARY, llama, token_ids
from torch import nn

from lora_null import LoraNullConfig, calibrate

# Tiny products are faster on one thread, and the bits of a sum depend on the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")


class Reader(nn.Module):
    """Two linear layers that read one tensor, as ``routing`` says."""

    def __init__(self, routing):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.routing, self.calls = routing, 0

    def forward(self, ids):
        x = self.embedding(ids)
        self.calls += 1
        y = self.first(x.view(-1, 8) if self.routing == "views" else x)
        if self.routing == "overwritten":
            x.mul_(2)
        elif self.routing == "transposed":
            x = x.transpose(0, 1)
        elif self.routing == "copied" or (self.routing == "changing" and self.calls == 4):
            x = x.clone()
        elif self.routing == "recycled":
            # the allocator may well give the freed block to the next tensor of this size
            shape = x.shape
            del x
            x = torch.ones(shape)
        return y.sum() + self.second(x.view(-1, 8) if self.routing == "views" else x).sum()


@pytest.mark.parametrize("routing", ["same", "views", "overwritten", "transposed", "copied", "recycled"])
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_only_the_very_same_tensor_is_shared(routing, inference):
    model, ids = Reader(routing), token_ids(9, 9)

    def run_model():
        with torch.inference_mode(inference):
            model(ids)

    got = calibrate(model, run_model)
    assert len(got) == (1 if routing in ("same", "views") else 2)
    x = model.embedding(ids).detach().double().flatten(0, 1)
    second = {"overwritten": 2 * x, "recycled": torch.ones_like(x)}.get(routing, x)
    torch.testing.assert_close(got["first"].double(), x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["second"].double(), second.T @ second, rtol=1e-5, atol=1e-5)


def test_routing_that_changes_later_is_an_error_with_a_way_out():
    batches = [token_ids(3, 3, seed) for seed in range(6)]
    with pytest.raises(ValueError, match=r"second was grouped with first.*share_inputs=False"):
        calibrate(Reader("changing"), batches)
    got = calibrate(Reader("changing"), batches, share_inputs=False)
    assert got.groups == {"first": ("first",), "second": ("second",)}
    assert torch.equal(got["first"], got["second"])


def test_watching_keeps_no_activation_alive():
    from torch.multiprocessing.reductions import StorageWeakRef

    from lora_null.calibration.shared_inputs import SharedInputs

    shared, x = SharedInputs(), torch.randn(4, 4)
    assert shared.receive("first", x) and not shared.receive("second", x)
    weak = StorageWeakRef(x.untyped_storage())
    del x
    assert weak.expired()
    for _ in range(5):
        x = torch.randn(4, 4)
        assert shared.receive("first", x) and not shared.receive("second", x)
    assert len(shared._latest) == 1


def _state(model):
    return (
        [(name, module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        model.config.to_dict(),
    )


@pytest.mark.parametrize("low_memory", [False, True], ids=["streaming", "layerwise"])
@pytest.mark.parametrize("fault", [None, "data", "model", "callback", "interrupt"])
def test_the_model_is_left_as_it_was(fault, low_memory):
    model = llama().train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.requires_grad_(False)
    model(token_ids(1, 3))  # transformers sets up what it keeps on first use
    before = _state(model)

    def batches():
        yield token_ids(2, 40)
        if fault == "data":
            raise OSError("broken file")
        yield token_ids(2, 40)

    def run_model():
        model(token_ids(1, 5))
        raise OSError("broken loop")

    if fault == "model":
        norm, forward = model.model.layers[1].input_layernorm, model.model.layers[1].input_layernorm.forward
        calls = []

        def fail(x):
            calls.append(x)
            if len(calls) == 3:
                raise OSError("broken layer")
            return forward(x)

        norm.forward = fail
    if fault == "interrupt":
        handle = model.model.norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))

    if fault is None:
        calibrate(model, batches(), low_memory=low_memory)
    elif fault == "callback":
        with pytest.raises(OSError, match="broken"):
            calibrate(model, run_model)
    elif fault == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, batches(), low_memory=low_memory)
        handle.remove()
    else:
        with pytest.raises(OSError, match="broken"):
            calibrate(model, batches(), low_memory=low_memory)
    if fault == "model":
        del norm.forward
    assert _state(model) == before


@pytest.mark.parametrize("queue_tokens", [8, 300, 100_000], ids=["direct", "queued", "flushed at the end"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_names_the_layer_and_the_batch(queue_tokens, value):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = 0
        model.model.embed_tokens.weight[77] = value
    batches = [token_ids(2, 40, seed) % 77 for seed in range(5)]
    batches[3][1, 20] = 77
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj, batch 3 .*bfloat16"):
        calibrate(model, batches, queue_tokens=queue_tokens)


def test_nan_on_padding_does_not_matter():
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = torch.nan
    ids, mask = token_ids(3, 70) % 77, torch.ones(3, 70, dtype=torch.long)
    ids[:, 60:], mask[:, 60:] = 77, 0
    # after the first attention block the model itself has spread the NaN
    config = LoraNullConfig(target_modules=r"model\.layers\.0\.self_attn\.q_proj")
    for queue_tokens in (8, 4096):
        got = calibrate(model, [{"input_ids": ids, "attention_mask": mask}], config, queue_tokens=queue_tokens)
        assert all(bool(matrix.isfinite().all()) for _, matrix in got.items())
