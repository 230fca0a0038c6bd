"""Interrupted calibrations continue to the same bits, and never on top of something else."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lora_null import Covariances, LoraNullConfig, calibrate
from lora_null.models.identity import weights_key

# Tiny products are faster on one thread, and the bits of a sum depend on the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")


def llama(seed=0, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def batches(count=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (2, 13 + i % 5), generator=generator) for i in range(count)]


def stopping(source, after):
    """Yield ``after`` items, then fail."""
    yield from source[:after]
    raise InterruptedError


def assert_equal(one, other):
    assert one.groups == other.groups and one.tokens == other.tokens and one.metadata == other.metadata
    for key, matrix in one.items():
        assert torch.equal(matrix, other[key]), key


MODES = pytest.mark.parametrize("low_memory", [False, True], ids=["streaming", "layerwise"])


@MODES
def test_a_checkpoint_changes_nothing_and_a_finished_one_is_returned(tmp_path, low_memory):
    options = {"checkpoint_every": 2, "queue_tokens": 64, "low_memory": low_memory}
    wanted = calibrate(llama(), batches(), **options)
    path = tmp_path / "folder" / "run.ckpt"
    assert_equal(calibrate(llama(), batches(), checkpoint=path, **options), wanted)
    model, calls = llama(), []
    model.model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    assert_equal(calibrate(model, batches(), checkpoint=path, **options), wanted)
    assert len(calls) == 1  # the probe
    visible = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    assert sorted(visible) == ([f"run.ckpt.{i:04d}" for i in range(3)] if low_memory else ["run.ckpt"])


@pytest.mark.parametrize(("after", "accumulate"), [(1, "fp32"), (2, "fp32"), (5, "fp32"), (7, "fp64")])
def test_an_interrupted_run_continues_to_the_same_bits(tmp_path, after, accumulate):
    options = {"checkpoint_every": 2, "queue_tokens": 64, "accumulate": accumulate}
    wanted = calibrate(llama(), batches(), **options)
    path = tmp_path / "run.ckpt"
    with pytest.raises(InterruptedError):
        calibrate(llama(), stopping(batches(), after), checkpoint=path, **options)
    assert path.exists() == (after >= 2)
    assert_equal(calibrate(llama(), iter(batches()), checkpoint=path, **options), wanted)


def test_layers_first_reached_after_the_interruption_are_kept_apart(tmp_path):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(64, 8)
            self.always, self.seldom = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input_ids):
            x = self.embedding(input_ids)
            return self.always(x), self.seldom(x) if input_ids.shape[1] == 17 else None

    data = batches()
    assert data[4].shape[1] == 17
    wanted = calibrate(Routed(), data, checkpoint_every=2)
    assert set(wanted.groups) == {"always", "seldom"}
    with pytest.raises(InterruptedError):
        calibrate(Routed(), stopping(data, 3), checkpoint=tmp_path / "c", checkpoint_every=2)
    assert_equal(calibrate(Routed(), data, checkpoint=tmp_path / "c", checkpoint_every=2), wanted)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model": lambda: llama(seed=1)}, "model: checkpoint [0-9a-f]{32}, this run [0-9a-f]{32}"),
        ({"model": lambda: llama(dtype=torch.bfloat16)}, "model: checkpoint"),
        ({"batches": batches(seed=1)}, "data: checkpoint [0-9a-f]{32}, this run [0-9a-f]{32}"),
        ({"batches": batches()[::-1]}, "data: "),
        ({"batches": batches(3)}, "batches: checkpoint at least 4, this run 3"),
        ({"config": LoraNullConfig(target_modules=["q_proj"])}, "targets: "),
        ({"mask": "none"}, "mask: checkpoint attention, this run none"),
        ({"accumulate": "fp64"}, "accumulate: checkpoint fp32, this run fp64"),
        ({"queue_tokens": 65}, "queue_tokens: checkpoint 64, this run 65"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_another_key_is_refused_naming_both(tmp_path, change, names):
    path = tmp_path / "run.ckpt"
    arguments = {"model": llama(), "batches": batches(), "checkpoint_every": 2, "queue_tokens": 64}
    with pytest.raises(InterruptedError):
        calibrate(**{**arguments, "batches": stopping(batches(), 5)}, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"(?s)run\.ckpt belongs to another calibration.*{names}.*another path"):
        calibrate(**{**arguments, **{k: v() if callable(v) else v for k, v in change.items()}}, checkpoint=path)
    assert path.read_bytes() == before


def test_the_key_keeps_the_strings_of_checkpoints_that_exist(tmp_path):
    path = tmp_path / "c"
    calibrate(llama(), batches(2), checkpoint=path)
    with safe_open(path, framework="pt") as file:
        key = json.loads(file.metadata()["key"])
    assert list(key)[:3] == ["format", "model", "targets"]
    assert {name: key[name] for name in list(key)[3:]} == {
        "mask": "attention",
        "accumulate": "fp32",
        "normalize": "None",
        "share_inputs": "True",
        "queue_tokens": "4096",
        "checkpoint_every": "32",
        "low_memory": "False",
        "process": "0 of 1",
    }
    assert key["format"] == "1"


def test_a_finished_checkpoint_refuses_more_data(tmp_path):
    calibrate(llama(), batches(4), checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="batches: checkpoint 4, this run more than 4"):
        calibrate(llama(), batches(5), checkpoint=tmp_path / "c")


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path):
    calibrate(llama(), batches(4)).save(tmp_path / "c")
    with pytest.raises(ValueError, match=r"kind 'lora_null\.covariances'"):
        calibrate(llama(), batches(4), checkpoint=tmp_path / "c")
    calibrate(llama(), batches(4), checkpoint=tmp_path / "d")
    with pytest.raises(ValueError, match=r"kind 'lora_null\.calibration'"):
        Covariances.load(tmp_path / "d")
    (tmp_path / "d").write_bytes((tmp_path / "d").read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged"):
        calibrate(llama(), batches(4), checkpoint=tmp_path / "d")


@pytest.mark.parametrize("old", [False, True], ids=["checksum of the header", "older file"])
@pytest.mark.parametrize(
    ("text", "other"),
    [
        ('"batches": 4', '"batches": 0'),
        ('"batches": 4', '"batches": 2'),
        ('"batches": 4', '"batches": 6'),
        ('"batches": 4', '"batches": 4.0'),
        ('"batches": 4', '"batches": true'),
        ('"finished": false', '"finished": 0'),
        ('"finished": false', '"finished": true'),
        ('"tokens": {"model.layers.0.self_attn.q_proj": ', '"tokens": {"model.layers.0.self_attn.q_proj": -'),
        ('"calls": {"model.layers.0.self_attn.q_proj": 4', '"calls": {"model.layers.0.self_attn.q_proj": null'),
        ('"calls": {"model.layers.0.self_attn.q_proj": 4, ', '"calls": {'),
        ('{"model.layers.0.self_attn.q_proj": ["model', '{"model.layers.9.self_attn.q_proj": ["model'),
        ('["model.layers.0.self_attn.q_proj", ', '["model.layers.0.mlp.down_proj", '),
    ],
    ids=str,
)
def test_a_changed_header_is_refused_and_never_counts_twice(tmp_path, text, other, old):
    options = {"checkpoint_every": 2, "queue_tokens": 64}
    path = tmp_path / "run.ckpt"
    with pytest.raises(InterruptedError):
        calibrate(llama(), stopping(batches(), 5), checkpoint=path, **options)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, content = json.loads(data[8 : 8 + length]), data[8 + length :]
    progress = header["__metadata__"]["progress"]
    assert progress.count(text) == 1
    header["__metadata__"]["progress"] = progress.replace(text, other)
    if old:
        content = content[:-4]
        header["crc32"]["shape"][0] -= 1
        header["crc32"]["data_offsets"][1] -= 4
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content)
    with pytest.raises(ValueError, match=r"run\.ckpt (is damaged|belongs to another)"):
        calibrate(llama(), batches(), checkpoint=path, **options)


def test_checkpoints_without_a_checksum_of_their_header_are_continued(tmp_path):
    options = {"checkpoint_every": 2, "queue_tokens": 64}
    wanted = calibrate(llama(), batches(), **options)
    path = tmp_path / "run.ckpt"
    with pytest.raises(InterruptedError):
        calibrate(llama(), stopping(batches(), 5), checkpoint=path, **options)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["crc32"]["shape"][0] -= 1
    header["crc32"]["data_offsets"][1] -= 4
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length : -4])
    assert_equal(calibrate(llama(), batches(), checkpoint=path, **options), wanted)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.timeout(60)
def test_pipes_and_devices_are_no_checkpoints(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "run.0001")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, low_memory in (("pipe", False), ("zero", False), ("run", True)):
        with pytest.raises(ValueError, match="is a pipe, a device or a socket"):
            calibrate(llama(), batches(), checkpoint=tmp_path / name, low_memory=low_memory)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "run.0001").is_fifo()


@MODES
def test_names_of_legal_length_hold_a_checkpoint(tmp_path, low_memory):
    path = tmp_path / ("c" * 250)
    wanted = calibrate(llama(), batches(3), low_memory=low_memory)
    for _ in range(2):
        assert_equal(calibrate(llama(), batches(3), checkpoint=path, low_memory=low_memory), wanted)


def test_a_checkpoint_in_use_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"

    def data():
        yield batches()[0]
        yield batches()[1]
        with pytest.raises(ValueError, match="in use by another process"):
            calibrate(llama(), batches(), checkpoint=path)

    calibrate(llama(), data(), checkpoint=path)


def test_a_callback_cannot_be_continued(tmp_path):
    with pytest.raises(ValueError, match="need the batches themselves"):
        calibrate(llama(), lambda: None, checkpoint=tmp_path / "c")


def test_the_weights_key_sees_every_bit():
    model = llama(dtype=torch.bfloat16)
    key = weights_key(model)
    assert key == weights_key(llama(dtype=torch.bfloat16))
    weight = model.model.layers[1].mlp.up_proj.weight.data
    saved = weight.clone()
    weight.view(torch.int16)[7, 5] ^= 1
    assert weights_key(model) != key
    weight.copy_(saved)
    weight[[0, 1]] = saved[[1, 0]]
    assert weights_key(model) != key
    weight.copy_(saved)
    weight[:, [0, 1]] = saved[:, [1, 0]]
    assert weights_key(model) != key
    weight.copy_(saved)
    assert weights_key(model) == key


class Stack(nn.Module):
    """Three layers without transformers, which takes seconds to import in each process."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(3))

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def _worker(path: str, low_memory: str) -> None:
    """Calibrate slowly enough to be killed at any moment; run in a process of its own."""
    torch.set_num_threads(1)
    model = Stack()
    model.layers[0].register_forward_hook(lambda *_: time.sleep(0.004))
    result = calibrate(
        model,
        batches(24),
        checkpoint=path + ".ckpt",
        checkpoint_every=2,
        queue_tokens=64,
        low_memory=low_memory == "True",
        progress=False,
    )
    result.save(path)


@MODES
def test_sigkill_at_a_random_moment(tmp_path, low_memory):
    seed = int.from_bytes(os.urandom(4), "little")
    rng = random.Random(seed)
    path = tmp_path / "result"
    wanted = calibrate(Stack(), batches(24), checkpoint_every=2, queue_tokens=64, low_memory=low_memory)
    kills, attempts = 0, 0
    while not path.exists():
        attempts += 1
        assert attempts < 20, "the run does not advance"
        process = subprocess.Popen([sys.executable, __file__, str(path), str(low_memory)])
        first = Path(str(path) + (".ckpt.0000" if low_memory else ".ckpt"))
        # wait for the run to be on its way, then kill it within the time that it takes
        while process.poll() is None and kills == 0 and not first.exists():
            time.sleep(0.005)
        try:
            process.wait(rng.uniform(0, 0.1) if kills == 0 else None)
            assert process.returncode == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills, f"never killed, seed {seed}"
    assert_equal(Covariances.load(path), wanted)
    leftovers = [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]
    assert not leftovers, f"seed {seed}"


if __name__ == "__main__":
    _worker(*sys.argv[1:])
