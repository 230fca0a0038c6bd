"""A run in one pass that is killed anywhere goes on to the same bits, and never on top of something else."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lora_null
from lora_null import LoraNullConfig

# Tiny products are faster on one thread, and the bits of a sum depend on the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = LoraNullConfig(r=4)


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (2, 13 + number % 3), generator=generator) for number in range(6)]


def start(folder, output="out", data=None, config=CONFIG, **options):
    lora_null.initialize_streaming(folder / "model", data or batches(), config, folder / output, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def wanted(llama, tmp_path):
    """Return a folder with a model, and the bytes of the adapter and the covariances of a run without interruption."""
    llama(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    start(tmp_path, "whole", keep_covariances=tmp_path / "whole.cov", progress=False)
    return tmp_path, contents(tmp_path / "whole"), (tmp_path / "whole.cov").read_bytes()


def die_at(monkeypatch, number):
    """Die at the beginning, in the middle or at the end of what a run does after its layers are named ``number``."""
    from lora_null.onepass import run
    from lora_null.onepass.layers import LayerFiles

    calls = []

    def dying(original, when):
        def call(*args, **options):
            calls.append(1)
            if len(calls) == number and when == "before":
                raise Killed
            result = original(*args, **options)
            if len(calls) == number and when == "after":
                raise Killed
            return result

        return call

    monkeypatch.setattr(LayerFiles, "write", dying(LayerFiles.write, "before" if number % 2 else "after"))
    monkeypatch.setattr(run, "_once", dying(run._once, "after" if number % 2 else "before"))
    return calls


def kill_at(monkeypatch, number, folder, **options):
    """Start a run that dies there, and leave everything else as it was."""
    with monkeypatch.context() as patch:
        die_at(patch, number)
        with pytest.raises(Killed):
            start(folder, progress=False, **options)


@pytest.mark.parametrize("number", range(1, 7))
def test_every_layer_and_output(wanted, monkeypatch, number):
    folder, adapter, covariances = wanted
    keep = folder / "out.cov"
    kill_at(monkeypatch, number, folder, keep_covariances=keep)
    assert (folder / ".out.work" / "key.json").exists()
    start(folder, keep_covariances=keep, progress=False)
    assert contents(folder / "out") == adapter and keep.read_bytes() == covariances
    assert not (folder / ".out.work").exists()


def test_finished_layers_are_not_read_again(wanted, monkeypatch):
    from lora_null.models.shards import Shards

    folder, adapter, _ = wanted
    kill_at(monkeypatch, 3, folder)
    read, original = [], Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, name: read.append(name) or original(self, name))
    start(folder, progress=False)
    assert contents(folder / "out") == adapter
    # two layers were finished, and what enters the third lay in a file
    assert {name.split(".")[2] for name in read} == {"2", "3"}


@pytest.mark.parametrize("change", ["data", "config", "weights"])
def test_another_run_is_refused(wanted, monkeypatch, change):
    folder, _, _ = wanted
    kill_at(monkeypatch, 2, folder)
    options = {"data": {"data": batches(1)}, "config": {"config": LoraNullConfig(r=5)}}.get(change, {})
    if change == "weights":
        os.utime(folder / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="belongs to another calibration"):
        start(folder, progress=False, **options)
    assert not (folder / "out").exists()


def test_damage_is_named_and_leftovers_without_a_key_are_dropped(wanted, monkeypatch):
    folder, adapter, _ = wanted
    kill_at(monkeypatch, 3, folder)
    layer = folder / ".out.work" / "layer.0001.safetensors"
    whole = layer.read_bytes()
    layer.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"layer\.0001\.safetensors is damaged"):
        start(folder, progress=False)
    assert not (folder / "out").exists()
    (folder / ".out.work" / "key.json").unlink()
    start(folder, progress=False)
    assert contents(folder / "out") == adapter


def test_hidden_states_that_are_cut_short_are_named(wanted, monkeypatch):
    folder, _, _ = wanted
    kill_at(monkeypatch, 3, folder)
    hidden = folder / ".out.work" / "hidden.0002"
    assert json.loads((folder / ".out.work" / "hidden.0002.json").read_text())["dtype"] == "float32"
    hidden.write_bytes(hidden.read_bytes()[:-4])
    with pytest.raises(ValueError, match="cut short"):
        start(folder, progress=False)


def _worker(folder):
    torch.set_num_threads(1)
    start(Path(folder), keep_covariances=Path(folder) / "out.cov", progress=False)


# Twenty by hand: LORA_NULL_KILLS is no setting of the package.
KILLS = int(os.environ.get("LORA_NULL_KILLS", "3"))


def begun(folder):
    """Say when a run last began its work; its imports take longer than the rest."""
    try:
        return (folder / ".out.work" / "key.json").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def test_sigkill_at_random_moments(wanted):
    folder, adapter, covariances = wanted
    seed = int.from_bytes(os.urandom(4), "little")
    rng, kills, attempts = random.Random(seed), 0, 0
    # it may have been killed when all was done
    while not (folder / "out").exists() or (folder / ".out.work").exists():
        attempts += 1
        assert attempts < 10 * KILLS, f"the run does not advance, seed {seed}"
        before = begun(folder)
        process = subprocess.Popen([sys.executable, __file__, str(folder)])
        # wait for the run to be on its way, then kill it within the time that it takes
        while process.poll() is None and kills < KILLS and begun(folder) in (None, before):
            time.sleep(0.002)
        try:
            process.wait(rng.uniform(0, 0.4) if kills < KILLS else None)
            assert process.returncode == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills, f"never killed, seed {seed}"
    assert contents(folder / "out") == adapter and (folder / "out.cov").read_bytes() == covariances, f"seed {seed}"
    if process.returncode:
        # killed when all was done but the sweeping, which the next run does, whatever becomes of it
        with pytest.raises(FileExistsError):
            start(folder, keep_covariances=folder / "out.cov", progress=False)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")], f"seed {seed}"


def test_a_refused_run_leaves_nothing_that_refuses_the_mended_one(wanted):
    folder, adapter, _ = wanted
    refused = LoraNullConfig(r=4, train="b_in_basis", energy=0.999999)
    with pytest.raises(ValueError, match=r"[Ll]ower it"):
        start(folder, config=refused, progress=False)
    assert not (folder / ".out.work").exists()
    start(folder, progress=False)
    assert contents(folder / "out") == adapter


def test_one_path_for_both_outputs(wanted):
    folder, _, _ = wanted
    with pytest.raises(ValueError, match="keep_covariances and the output are both"):
        start(folder, keep_covariances=folder / "out", progress=False)
    assert not (folder / "out").exists()


if __name__ == "__main__":
    _worker(*sys.argv[1:])
