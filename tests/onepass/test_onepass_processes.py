"""Two processes over gloo divide the tokens and solves of one pass; the first writes, and all go on together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import free_port, leave, run_two, start_two
from safetensors.torch import load_file

import lora_null
from lora_null import Covariances, LoraNullConfig
from lora_null.onepass import run as onepass

# The bits of a sum depend on the number of threads, and a basis of a null space on them.
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = LoraNullConfig(r=4, train="b")


def batches():
    """Seven, so that the shares differ."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(97, (2, 23 + number % 3), generator=generator) for number in range(7)]


def start(folder, output, data=None, config=CONFIG):
    keep = folder / f"{output}.cov"
    data = batches() if data is None else data
    lora_null.initialize_streaming(
        folder / "model", data, config, folder / output, keep_covariances=keep, progress=False
    )


def contents(folder, output):
    paths = [*sorted((folder / output).iterdir()), folder / f"{output}.cov"]
    return {path.name.replace(output, ""): path.read_bytes() for path in paths}


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


REFUSED = {
    # read by the second process only
    "token": ([torch.tensor([[5]]), torch.tensor([[97]])], CONFIG),
    "few": (batches()[:1], CONFIG),
    "energy": (None, LoraNullConfig(r=4, train="b_in_basis", energy=0.999999)),
    "there": (None, CONFIG),
}


def _whole(folder: Path) -> None:
    """Run to the end, and refuse what is to be refused; say what was written and raised."""
    rank, original, written = dist.get_rank(), onepass._once, []
    onepass._once = lambda mark, path, *rest: written.append(path.name) or original(mark, path, *rest)
    start(folder, "two")
    found = {"written": written}
    for name, (data, config) in REFUSED.items():
        try:
            start(folder, "two" if name == "there" else name, data, config)
        except (ValueError, FileExistsError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    (folder / f"found.{rank}").write_text(json.dumps(found))


def _dying(folder: Path, who: str, layer: str) -> None:
    """Die where the first process writes a finished layer: it, or the other one."""
    original, calls = onepass.in_first_process, []

    def dying(work):
        calls.append(1)
        if dist.get_rank() == int(who) and len(calls) == int(layer):
            os.kill(os.getpid(), signal.SIGKILL)
        original(work)

    onepass.in_first_process = dying
    start(folder, "killed")


def _worker(folder: str, *death: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if death:
        _dying(Path(folder), *death)
    elif (Path(folder) / "two").exists():
        start(Path(folder), "killed")
    else:
        _whole(Path(folder))
    leave()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with what two processes and one made of one model."""
    from tiny_models import make_llama

    folder = tmp_path_factory.mktemp("gloo")
    make_llama(num_hidden_layers=4).save_pretrained(folder / "model")
    run_two(__file__, folder)
    start(folder, "one")
    return folder


def test_two_processes_make_what_one_makes(finished):
    one, two = (Covariances.load(finished / f"{name}.cov") for name in ("one", "two"))
    assert two.groups == one.groups and two.tokens == one.tokens
    for key, matrix in one.items():
        assert (two[key] - matrix).abs().max() <= 16 * torch.finfo(torch.float32).eps * matrix.abs().max(), key
    states = [json.loads((finished / name / "lora_null.json").read_text()) for name in ("one", "two")]
    assert states[0]["base_fingerprint"] == states[1]["base_fingerprint"]
    assert states[1]["energies"] == pytest.approx(states[0]["energies"], rel=1e-3, abs=1e-7)
    # angles would fail where the smallest eigenvalues are rounding: what the adapter reads is judged by its energy
    for name, tensor in load_file(finished / "two" / "adapter_model.safetensors").items():
        if "lora_A" in name:
            C = one[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")].double()
            Q = torch.linalg.qr(tensor.double().mT).Q
            best = torch.linalg.eigvalsh(C)[: len(tensor)].sum()
            assert (Q.mT @ C @ Q).trace() - best < 1e-3 * best + 1e-7 * C.trace(), name


def test_the_first_writes_and_nothing_is_left(finished):
    found = [json.loads((finished / f"found.{rank}").read_text()) for rank in range(2)]
    assert sorted(found[0]["written"]) == ["two", "two.cov"] and found[1]["written"] == []
    assert hidden(finished) == []


def test_what_one_refuses_ends_all_of_them(finished):
    first, second = (json.loads((finished / f"found.{rank}").read_text()) for rank in range(2))
    assert second["token"].startswith("ValueError") and "token ids 97" in second["token"]
    assert first["token"].startswith("OtherProcessFailed: Stopped because process 1 failed with ValueError")
    assert "Process 1 of 2 has no batch with tokens" in second["few"] and "process 1 failed" in first["few"]
    # the solves are divided, and each has one that is refused
    assert all("ower it to energy=" in each["energy"] for each in (first, second))
    assert first["there"].startswith("FileExistsError") and "process 0 failed with FileExistsError" in second["there"]
    assert not any((finished / name).exists() for name in ("token", "few", "energy"))


def test_a_killed_run_goes_on_with_as_many_processes_only(finished):
    for death in (("0", "2"), ("1", "3")):
        processes = start_two(__file__, finished, *death)
        try:
            codes = [process.wait(120) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert codes[int(death[0])] == -signal.SIGKILL and codes[1 - int(death[0])] != 0
        assert hidden(finished)[:2] != [] and not (finished / "killed").exists()
    with pytest.raises(ValueError, match="process: checkpoint 0 of 2, this run 0 of 1"):
        start(finished, "killed")
    run_two(__file__, finished)
    assert contents(finished, "killed") == contents(finished, "two")
    assert [name for name in hidden(finished) if not name.endswith(".lock")] == []


def test_the_command_under_torchrun(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["--no-python", "--", str(Path(sys.executable).with_name("lora-null"))]
    init = ["init", "model", "out", "--data", "text.txt", "--r", "4", "--batch-size", "4", "--train", "b", "--json"]

    def torchrun(*more, words=init):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        words = [*command, *words, *more]
        return subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)

    done = torchrun()
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["output"] == "out"
    assert (folder / "out" / "adapter_model.safetensors").exists() and hidden(folder) == []
    again = torchrun()
    assert again.returncode != 0 and again.stderr.count("error: out exists already") == 1
    assert "OtherProcessFailed" not in again.stderr
    # in two steps, too, tokens and solves are divided and the first process writes
    summed = torchrun(
        words=["calibrate", "model", "--data", "text.txt", "--batch-size", "4", "--output", "c", "--json"]
    )
    assert summed.returncode == 0, summed.stderr[-3000:]
    assert json.loads(summed.stdout)["output"] == "c"
    started = torchrun(words=["init", "model", "c", "two_steps", "--r", "4", "--train", "b", "--json"])
    assert started.returncode == 0, started.stderr[-3000:]
    assert json.loads(started.stdout)["output"] == "two_steps"
    one, two = (load_file(folder / name / "adapter_model.safetensors") for name in ("out", "two_steps"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    _worker(*sys.argv[1:])
