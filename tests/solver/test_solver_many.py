"""null_spaces: order, bounded memory, errors, and what is left behind."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import spectra
import torch

from lora_null import Covariances, null_space, null_spaces
from lora_null.solver.overlapped import _own_stream


def covariances(count, d=40):
    return [(f"layer.{i}", spectra.with_spectrum(spectra.power(d, 1 + i / 4), seed=i)[0]) for i in range(count)]


@pytest.mark.parametrize("workers", [1, 2, 3, None])
def test_results_come_in_the_order_of_the_input(workers):
    items = covariances(7)
    found = list(null_spaces(items, 5, workers=workers, progress=False, method="filtered", seed=4))
    assert [key for key, _ in found] == [key for key, _ in items]
    for (_, C), (_, space) in zip(items, found, strict=True):
        assert space.energy == pytest.approx(null_space(C, 5, method="filtered", seed=4).energy, rel=1e-12)


def test_mappings_and_covariances_are_taken():
    items = covariances(3)
    wanted = [(key, null_space(C, 4).energy) for key, C in items]
    collected = Covariances(dict(items), {key: (key,) for key, _ in items}, dict.fromkeys(dict(items), 100))
    for given in (dict(items), collected):
        found = [(key, space.energy) for key, space in null_spaces(given, 4, workers=1, progress=False)]
        assert found == wanted


def test_task_covariances_go_by_key():
    items, tasks = covariances(4), dict(reversed(covariances(5)))
    tasks = {key: C.flip(0).flip(1) for key, C in tasks.items()}
    groups = Covariances(tasks, {key: (key,) for key in tasks}, dict.fromkeys(tasks, 100))
    for given in (tasks, groups):
        for (_, C), (key, space) in zip(
            items, null_spaces(items, 5, task=given, energy=0.5, progress=False), strict=True
        ):
            alone = null_space(C, 5, task=tasks[key], energy=0.5)
            assert space.energy == pytest.approx(alone.energy, rel=1e-9) and space.info["k"] == alone.info["k"]


def test_a_key_that_the_task_lacks_is_named():
    items = covariances(3)
    with pytest.raises(ValueError, match=r"layer\.2: null_spaces: task has no matrix.*another model"):
        list(null_spaces(items, 3, task=dict(items[:2]), progress=False))
    with pytest.raises(TypeError, match=r"task is a Tensor; expected lora_null\.Covariances"):
        list(null_spaces(items, 3, task=items[0][1], progress=False))


@pytest.mark.parametrize("given", [torch.eye(4), [torch.eye(4)], ["layer.0"]], ids=["matrix", "matrices", "keys"])
def test_what_is_no_pair_is_refused(given):
    with pytest.raises(TypeError, match=r"expected pairs of a key and a matrix.*enumerate\(matrices\)"):
        list(null_spaces(given, 2, progress=False))


def test_what_is_no_collection_is_refused():
    with pytest.raises(TypeError, match=r"covariances is a NoneType; expected lora_null\.Covariances"):
        list(null_spaces(None, 2, progress=False))


def test_reads_no_further_than_the_workers_need():
    taken = 0

    def counted():
        nonlocal taken
        for item in covariances(12):
            taken += 1
            yield item

    workers = 2
    for done, _ in enumerate(null_spaces(counted(), 3, workers=workers, progress=False), start=1):
        assert taken <= done + workers


def test_covariances_are_read_in_the_calling_thread():
    threads = set()

    def generator():
        for item in covariances(3):
            threads.add(threading.get_ident())
            yield item

    list(null_spaces(generator(), 3, progress=False))
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("stop_after", [0, 1, 99])
def test_threads_are_restored_and_workers_end(stop_after):
    before = torch.get_num_threads()
    running = threading.active_count()
    spaces = null_spaces(covariances(5), 3, workers=2, progress=False)
    for i, _ in enumerate(spaces):
        if i >= stop_after:
            break
    spaces.close()
    assert torch.get_num_threads() == before
    assert threading.active_count() == running


def test_an_error_names_the_matrix():
    items = covariances(3)
    items[1] = ("layer.1.mlp", torch.zeros(40, 40))
    with pytest.raises(ValueError, match=r"layer\.1\.mlp: .*no activations"):
        list(null_spaces(items, 3, progress=False))
    with pytest.raises(TypeError, match=r"layer\.1\.mlp: "):
        list(null_spaces([("layer.1.mlp", None)], 3, progress=False))


def test_no_matrices_and_no_workers():
    assert list(null_spaces([], 3, progress=False)) == []
    with pytest.raises(ValueError, match="workers is 0"):
        list(null_spaces(covariances(1), 3, workers=0, progress=False))


def test_progress_bar_counts_matrices(capsys):
    list(null_spaces(covariances(3), 3))
    assert "3/3" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_streams_give_usable_results():
    items = [(key, C.cuda()) for key, C in covariances(6, d=600)]
    for (_, C), (_, space) in zip(items, null_spaces(items, 16, progress=False, method="filtered"), strict=True):
        energy = (space.basis * (C @ space.basis)).sum().item()
        assert energy == pytest.approx(space.energy, rel=1e-9)


def test_a_thread_keeps_its_stream(monkeypatch):
    """Memory is cached by stream: a new one for each matrix would keep gigabytes for each."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(SimpleNamespace(device=device)) or made[-1])
    first, second = torch.device("cuda:0"), torch.device("cuda:1")

    def work(_):
        return [
            _own_stream(first) is _own_stream(first),
            _own_stream(second).device == second,
        ]

    with ThreadPoolExecutor(1) as pool:
        assert all(all(result) for result in pool.map(work, range(3)))
    assert len(made) == 2


def test_large_matrices_get_all_threads_one_at_a_time(monkeypatch):
    """By their side alone, so that a matrix gives the same bits whatever is solved beside it."""
    seen = {}

    def note(C, r):
        seen[len(C)] = threading.get_ident(), torch.get_num_threads()
        return null_space(C, r)

    monkeypatch.setattr(sys.modules["lora_null.solver.null_spaces"], "null_space", note)
    monkeypatch.setattr(sys.modules["lora_null.solver.overlapped"], "ALONE", 64)
    items = [*covariances(2, d=40), ("large", covariances(1, d=64)[0][1]), *covariances(1, d=48)]
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert [key for key, _ in null_spaces(items, 3, progress=False)] == [key for key, _ in items]
        assert seen[64] == (threading.get_ident(), 4)
        assert {threads for _, threads in (seen[40], seen[48])} == {2}
        list(null_spaces(items, 3, workers=1, progress=False))
        assert seen[64][0] != threading.get_ident(), "a number of workers that is given holds"
    finally:
        torch.set_num_threads(before)
