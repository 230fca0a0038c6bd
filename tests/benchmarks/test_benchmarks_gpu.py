"""The first half hour on a new card, walked through without one."""

import json
import subprocess
import sys

import pytest
from benchmark_suite import ROOT, suite

gpu = suite("gpu")


def test_make_gpu_walks_through_everything_without_a_device(tmp_path):
    command = ["make", "gpu", "DRY=1", f"HERE={sys.executable}", f"ARGS=--output {tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    finished = {result["question"] for result in results if result["provider"] == "done"}
    assert finished == set(gpu.stages())
    tuned = json.loads((tmp_path / "sm_90_imitated.json").read_text())
    assert set(tuned["kernels"]) == {"syrk", "linear", "project", "outer", "dy"} and tuned["dispatch"]["linear"]


def context(tmp_path):
    return gpu.Context(dry=True, folder=tmp_path)


def test_a_stage_that_fails_or_hangs_costs_no_other(tmp_path, monkeypatch, capsys):
    def broken(context):
        context.keep("broken", "half of it", us=1.0)
        raise ArithmeticError("not the same bits")

    def hanging(context):
        import time

        time.sleep(60)

    good = (30.0, lambda context: context.keep("good", "it", us=2.0))
    monkeypatch.setattr(gpu, "stages", lambda: {"broken": (30.0, broken), "hanging": (0.1, hanging), "good": good})
    assert gpu.run(context(tmp_path), [], 5.0) == 1
    shown = capsys.readouterr().out
    assert "not the same bits" in shown and "half of it" in shown and "killed after 1 s" in shown
    assert "failed: broken, hanging" in shown
    # what was done is not done again, what failed is, and so is what is asked for
    order = []
    monkeypatch.setattr(gpu, "child", lambda stage, context, name: order.append(name))
    monkeypatch.setattr(gpu.multiprocessing, "get_context", lambda how: Direct)
    gpu.run(context(tmp_path), [], 5.0)
    assert order == ["broken", "hanging"]
    gpu.run(context(tmp_path), ["good"], 5.0)
    assert order == ["broken", "hanging", "good"]
    gpu.run(context(tmp_path), ["good"], 0.0)
    assert len(order) == 3, "a stage was started without time for it"


class Direct:
    """A process that is none."""

    class Process:
        exitcode = 0

        def __init__(self, target, args):
            self.start = lambda: target(*args)

        def join(self, seconds=None):
            pass

        def is_alive(self):
            return False


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        gpu.main(["--dry", "--output", str(tmp_path), "--again", "nothing"])
