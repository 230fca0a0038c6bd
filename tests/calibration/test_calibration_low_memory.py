"""Layer by layer: the same bits as in one pass, within the memory that the plan says."""

import gc
import logging

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_null import LoraNullConfig, calibrate, initialize, memory_plan

# Tiny products are faster on one thread, and the bits of a sum depend on the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")

GiB = 2**30


def llama(layers=4, hidden=32, intermediate=56):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def gemma():
    """A model whose layers get different masks: sliding and full attention by turns."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return Gemma2ForCausalLM(config).eval()


class Tuples(nn.Module):
    """Layers that return tuples, and target layers before, after and beside the stack."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

            def forward(self, hidden_states, scale=None):
                return hidden_states + scale * self.down(self.up(hidden_states).relu()), None

        self.embedding = nn.Embedding(64, 4)
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, input_ids, attention_mask=None):
        x = self.enter(self.embedding(input_ids))
        for layer in self.layers:
            x, nothing = layer(hidden_states=x, scale=torch.tensor(0.5))
            assert nothing is None
        return self.leave(x)


def padded_batches(count=5):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for i in range(count):
        mask = torch.ones(2, 12 + i, dtype=torch.long)
        mask[0, 9:] = 0
        ids = torch.randint(0, 64, mask.shape, generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@pytest.mark.parametrize("make", [llama, gemma, Tuples], ids=lambda make: make.__name__)
@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"offload": "cpu"}], ids=str)
def test_layer_by_layer_gives_the_same_bits(make, options):
    model, batches = make(), padded_batches()
    wanted = calibrate(model, batches, queue_tokens=64, checkpoint_every=2)
    homes = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    got = calibrate(model, iter(batches), queue_tokens=64, checkpoint_every=2, low_memory=True, **options)
    assert got.groups == wanted.groups and got.tokens == wanted.tokens
    for key, matrix in wanted.items():
        assert torch.equal(got[key], matrix), key
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == homes
    assert all("forward" not in vars(module) for module in model.modules())


def test_each_layer_runs_once_per_batch():
    model, batches, calls = llama(), padded_batches(), []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
    head = []
    model.lm_head.register_forward_hook(lambda *_: head.append(1))
    calibrate(model, batches, low_memory=True)
    probe, calls = calls[:4], calls[4:]
    assert probe == [0, 1, 2, 3]
    assert calls == [number for number in range(4) for _ in batches]
    assert len(head) == 1  # the probe


def test_models_that_cannot_be_walked_say_so():
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, layer = nn.Embedding(64, 8), nn.Linear(8, 8)
            self.layers = nn.ModuleList([layer, layer])

        def forward(self, ids):
            return self.layers[1](self.layers[0](self.embedding(ids)))

    class TwoTensors(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(64, 8)
            self.layers = nn.ModuleList([nn.MultiheadAttention(8, 1)])
            self.layers[0].forward = lambda x: (x, x)
            self.layers[0].extra = nn.Linear(8, 8)

        def forward(self, ids):
            return self.layers[0](self.layers[0].extra(self.embedding(ids)))[0]

    ids = torch.arange(12).view(2, 6)
    for model, message in [
        (nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 8)), "no torch.nn.ModuleList"),
        (Repeated(), "used twice"),
        (TwoTensors(), "pass on one tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            calibrate(model, [ids], low_memory=True)
    with pytest.raises(ValueError, match="need the batches themselves"):
        calibrate(llama(), lambda: None, low_memory=True)


def _matrices_alive(width):
    # every float32 tensor of a covariance's size, whatever its shape: matrices and packed triangles
    sizes = {width * width: [], width * (width + 1) // 2: []}
    gc.collect()
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.dtype == torch.float32 and thing.numel() in sizes:
            sizes[thing.numel()].append(thing.untyped_storage().data_ptr())
    return [len(set(found)) for found in sizes.values()]


def test_the_plan_is_refused_or_obeyed(tmp_path):
    # no other tensor of the model, or of another test, has 60 x 60 elements
    model, batches = llama(layers=6, intermediate=60), padded_batches()
    limit = 64 * 2**10
    with pytest.raises(
        ValueError, match=r"(?s)156\.4 KiB are needed on cpu, and 64\.0 KiB may.*low_memory=True.*24 cov"
    ):
        calibrate(model, batches, queue_tokens=16, memory_limit=limit)

    most, calls = [0, 0], 0

    def watch(*_):
        nonlocal most, calls
        calls += 1
        if calls == 6 + 6 * len(batches):  # the probe, and every layer
            most = _matrices_alive(60)

    options = {"queue_tokens": 16, "memory_limit": limit, "low_memory": True}
    with pytest.raises(ValueError, match=r"(?s)finished covariances, packed"):
        calibrate(model, batches, **options)
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(watch)
    got = calibrate(model, batches, checkpoint=tmp_path / "run", **options)
    assert len(got) == 24
    # in the last layer: its own matrix; the triangles of the five before it are mapped from their files
    assert most == [1, 5]
    assert next(iter(got.items()))[1].shape == (32, 32)


def test_a_plan_beyond_the_free_memory_is_refused():
    class Vast(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(64, 2)
            # claims a width, and has no memory of that size
            self.vast = nn.Linear(2, 2)
            self.vast.in_features = 2**24

        def forward(self, ids):
            return self.embedding(ids)

    with pytest.raises(ValueError, match=r"1048\d{3}\.\d\d GiB are needed on cpu, and .* GiB may"):
        calibrate(Vast(), [torch.zeros(1, 4, dtype=torch.long)])


@pytest.mark.parametrize("queue_tokens", [16, 64])
def test_the_plan_counts_what_is_allocated(queue_tokens, caplog):
    model, batch = llama(), padded_batches()[0]
    plan = memory_plan(model, batch, queue_tokens=queue_tokens)
    sums = 4 * 4 * (3 * 32 * 32 + 56 * 56)
    queues = 4 * 4 * queue_tokens * (3 * 32 + 56) if queue_tokens == 64 else 0
    assert plan.total("cpu") == sums + queues
    assert "16 covariances for 28 linear layers" in str(plan)
    with caplog.at_level(logging.INFO, logger="lora_null"):
        calibrate(model, [batch], queue_tokens=queue_tokens)
    assert str(plan) in caplog.text
    only_down = LoraNullConfig(target_modules=["down_proj"])
    assert memory_plan(model, batch, only_down, queue_tokens=16, accumulate="fp64").total("cpu") == 8 * 4 * 56 * 56


def test_the_plan_says_what_free_directions_take_in_training():
    model, batch = llama(), padded_batches()[0]
    config = LoraNullConfig(r=4, train="b_in_basis", energy=0.5, basis_dtype="bfloat16")
    plan = memory_plan(model, batch, config)
    assert plan.items == memory_plan(model, batch).items and not memory_plan(model, batch).later
    assert [item.size for item in plan.later] == [12 * 32 * 16 * 2, 4 * 56 * 28 * 2]
    assert "on cpu in training: free directions of 12 groups, at most (32, 16) bfloat16" in str(plan)
    adapted = initialize(model, calibrate(model, [batch], progress=False), config, progress=False)
    held = {id(m.directions): m.directions.held for m in adapted.modules() if hasattr(m, "directions")}
    assert 0 < sum(N.numel() * N.element_size() for N in held.values()) <= sum(item.size for item in plan.later)


def test_a_7b_model_fits_into_24_gb_by_accounting():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig()).to(torch.bfloat16)
        batch = torch.zeros(1, 2048, dtype=torch.long)
    assert sum(parameter.numel() for parameter in model.parameters()) > 6.7e9
    everything = memory_plan(model, batch)
    assert everything.total("meta") == 4 * 32 * (3 * 4096**2 + 11008**2) > 20 * GiB
    plan = memory_plan(model, batch, tokens=256 * 2048, low_memory=True, device="cuda:0", offload="cpu")
    one_layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert 4 * (3 * 4096**2 + 11008**2) + one_layer < plan.total("cuda:0") < 2 * GiB
    # even with all hidden states and the whole model on the accelerator
    beside = memory_plan(model, batch, tokens=256 * 2048, low_memory=True, device="cuda:0")
    assert beside.total("cuda:0") + 2 * 6.74e9 < 22 * GiB


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_in_cpu_memory_is_calibrated_on_the_gpu_within_its_plan():
    model, batches = llama(layers=8, hidden=512, intermediate=1024), padded_batches(12)
    wanted = calibrate(model, batches)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    options = {"low_memory": True, "device": "cuda:0", "offload": "cpu"}
    got = calibrate(model, batches, **options)
    plan = memory_plan(model, batches[-1], tokens=1000, **options)
    # cuBLAS takes a workspace once per process
    assert torch.cuda.max_memory_allocated() - before < plan.total("cuda:0") + 64 * 2**20
    assert all(not parameter.is_cuda for parameter in model.parameters())
    for key, matrix in wanted.items():
        assert (got[key] - matrix).norm() < 1e-4 * matrix.norm()
