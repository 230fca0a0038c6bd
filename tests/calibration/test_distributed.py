"""Two processes over gloo: each reads its share, the sums and the solves are those of one process."""

import json
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import leave, run_two, start_two
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lora_null
from lora_null import Covariances, calibrate
from lora_null.system.distributed import OtherProcessFailed, divide, gather, rank_and_size, share_of


class Stack(nn.Module):
    """A small stack of layers; ``blind`` layers see nothing in batches of 13 columns."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(3))
        self.seldom = nn.Linear(16, 16)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.seldom(x) if input_ids.shape[1] == 14 else x


def batches(count=9):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 64, (2, 13 + i % 2), generator=generator) for i in range(count)]


def rows():
    return torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(1))


def _cases(folder: Path) -> dict[str, Covariances]:
    """Calibrate in several ways; the same code runs in one process and in two."""
    rank, size = rank_and_size()
    sampler = DistributedSampler(TensorDataset(rows()), shuffle=False) if size > 1 else None
    mine = batches()[:3] if rank == 0 else batches()[3:]
    return {
        "list": calibrate(Stack(), batches()),
        "iterator": calibrate(Stack(), iter(batches())),
        "own share": calibrate(Stack(), batches() if size == 1 else mine, shard=False),
        "sampler": calibrate(Stack(), DataLoader(TensorDataset(rows()), batch_size=2, sampler=sampler)),
        "fewer batches than processes": calibrate(Stack(), batches(1)),
        "low memory, fewer batches than processes": calibrate(Stack(), batches(1), low_memory=True),
        "low memory": calibrate(Stack(), batches(), low_memory=True, checkpoint=folder / f"{size}.walk"),
        "low memory, again": calibrate(Stack(), batches(), low_memory=True, checkpoint=folder / f"{size}.walk"),
        "checkpoint": calibrate(Stack(), batches(), checkpoint=folder / f"{size}.run", checkpoint_every=2),
        "checkpoint, again": calibrate(Stack(), batches(), checkpoint=folder / f"{size}.run", checkpoint_every=2),
    }


def _worker(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, rank = Path(folder), dist.get_rank()
    for name, covariances in _cases(folder).items():
        covariances.save(folder / f"{name}.{rank}")

    for low_memory in (False, True):
        _resumable(Stack(), low_memory).save(folder / f"uninterrupted {low_memory}.{rank}")

    # the eigenproblems are divided, and everybody has all solutions
    covariances = Covariances.load(folder / f"list.{rank}")
    mine = divide({key: covariances.size(key) ** 3 for key in covariances})
    solved = {key: lora_null.null_space(covariances[key], 4) for key in mine}
    everything = gather(solved)
    energies = {key: everything[key].energy for key in covariances}
    (folder / f"energies.{rank}").write_text(json.dumps({"mine": mine, "energies": energies}))

    # an error in one process stops the other one, which would wait for ever
    def failing():
        yield batches()[0]
        if rank == 1:
            raise OSError("the disk is gone")
        yield batches()[1]

    data = batches()
    if rank == 1:
        data[3] = "not a tensor"
    for number, (given, options) in enumerate(
        ((data, {}), (failing(), {"shard": False}), (data, {"low_memory": True}))
    ):
        try:
            calibrate(Stack(), given, **options)
        except (OtherProcessFailed, TypeError, OSError) as error:
            (folder / f"error{number}.{rank}").write_text(f"{type(error).__name__}: {error}")
    leave()


def _resumable(model: nn.Module, low_memory: bool, **options) -> Covariances:
    return calibrate(model, batches(48), checkpoint_every=2, queue_tokens=64, low_memory=low_memory, **options)


def _slow_worker(folder: str, low_memory: str) -> None:
    """Calibrate slowly enough to be killed in the middle."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, rank, model = Path(folder), dist.get_rank(), Stack()
    model.layers[0].register_forward_hook(lambda *_: time.sleep(0.02))
    _resumable(model, low_memory == "True", checkpoint=folder / "run", progress=False).save(folder / f"result.{rank}")
    leave()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    run_two(__file__, folder)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return _cases(tmp_path_factory.mktemp("alone"))


def test_sums_equal_those_of_one_process(two_processes, one_process):
    for name, wanted in one_process.items():
        first, second = (Covariances.load(two_processes / f"{name}.{rank}") for rank in range(2))
        assert first.groups == second.groups == wanted.groups, name
        assert first.tokens == second.tokens == wanted.tokens, name
        assert first.metadata == second.metadata
        for key, matrix in wanted.items():
            assert torch.equal(first[key], second[key]), f"{name}: {key}"
            error = (first[key] - matrix).abs().max()
            # other orders of at most 300 additions in float32
            assert error <= 16 * torch.finfo(torch.float32).eps * matrix.abs().max(), f"{name}: {key}: {error:.1e}"


def test_a_layer_that_only_one_process_reaches_is_in_both(two_processes, one_process):
    assert "seldom" in one_process["list"] and one_process["list"].tokens["seldom"] == 4 * 28
    assert Covariances.load(two_processes / "list.0").tokens["seldom"] == 4 * 28


def test_a_finished_checkpoint_of_two_processes_gives_the_same_bits(two_processes):
    for name in ("checkpoint", "low memory"):
        first = Covariances.load(two_processes / f"{name}.0")
        again = Covariances.load(two_processes / f"{name}, again.0")
        for key, matrix in first.items():
            assert torch.equal(matrix, again[key])
    assert {path.name for path in two_processes.glob("2.run*")} == {"2.run.rank0", "2.run.rank1"}


def test_solves_are_divided(two_processes, one_process):
    answers = [json.loads((two_processes / f"energies.{rank}").read_text()) for rank in range(2)]
    assert answers[0]["energies"] == answers[1]["energies"]
    assert sorted(answers[0]["mine"] + answers[1]["mine"]) == sorted(one_process["list"].keys())
    assert answers[0]["mine"] and answers[1]["mine"]
    for key, energy in answers[0]["energies"].items():
        wanted = lora_null.null_space(one_process["list"][key], 4).energy
        assert abs(energy - wanted) <= 1e-3 * abs(wanted) + 1e-6


def test_a_failure_stops_the_other_process(two_processes):
    for number, message in enumerate(
        ("TypeError: Batch 1 is a str", "OSError: the disk", "TypeError: Batch 1 is a str")
    ):
        assert (two_processes / f"error{number}.1").read_text().startswith(message)
        text = (two_processes / f"error{number}.0").read_text()
        assert text.startswith(f"OtherProcessFailed: Stopped because process 1 failed with {message[:7]}")


@pytest.mark.parametrize("low_memory", [False, True], ids=["streaming", "layerwise"])
def test_sigkill_of_one_process_ends_the_other_and_both_continue_to_the_same_bits(two_processes, tmp_path, low_memory):
    seed = int.from_bytes(os.urandom(4), "little")
    rng = random.Random(seed)
    processes = start_two(__file__, tmp_path, low_memory)
    try:
        started = [tmp_path / f"run.rank{rank}{'.0000' if low_memory else ''}" for rank in range(2)]
        while not all(path.exists() for path in started) and all(process.poll() is None for process in processes):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        victim, other = rng.sample(processes, 2)
        victim.kill()
        assert victim.wait() != 0, f"seed {seed}: it had ended before"
        assert other.wait(60) != 0
    finally:
        for process in processes:
            process.kill()
    assert not list(tmp_path.glob("result*"))
    run_two(__file__, tmp_path, low_memory)
    for rank in range(2):
        want = Covariances.load(two_processes / f"uninterrupted {low_memory}.{rank}")
        got = Covariances.load(tmp_path / f"result.{rank}")
        assert got.tokens == want.tokens and got.metadata == want.metadata
        for key, matrix in want.items():
            assert torch.equal(got[key], matrix), f"seed {seed}: {key}"


def test_one_process_needs_no_group():
    assert rank_and_size() == (0, 1)
    assert list(share_of("abc")) == ["a", "b", "c"]
    assert divide({"a": 1.0, "b": 8.0}) == ["a", "b"]
    assert gather({"a": 1}) == {"a": 1}


@pytest.mark.parametrize("size", [2, 3, 7])
def test_division_is_a_fair_partition(monkeypatch, size):
    costs = {f"layer{i}": float((576, 1536)[i % 4 == 3] ** 3) for i in range(120)}
    shares = []
    for rank in range(size):
        monkeypatch.setattr("lora_null.system.distributed.rank_and_size", lambda rank=rank: (rank, size))
        shares.append(divide(costs))
    assert sorted(key for share in shares for key in share) == sorted(costs)
    loads = [sum(costs[key] for key in share) for share in shares]
    assert max(loads) <= 1536**3 + min(loads)


if __name__ == "__main__":
    _worker(sys.argv[1]) if len(sys.argv) == 2 else _slow_worker(*sys.argv[1:])
