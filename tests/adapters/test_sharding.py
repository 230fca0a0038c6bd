"""Adapted models in two processes over gloo: FSDP2, FSDP1, DDP and tensor parallel train as one process does."""

import json

import pytest
import sharding_worker
import torch
from processes import run_two

from lora_null.adapters import export_adapter
from lora_null.adapters.files import Adapter


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run all of it in two processes; return what a function has measured, in the first and in the second."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two(sharding_worker.__file__, folder)

    def read(work):
        return [json.loads((folder / f"{work}.{rank}.json").read_text()) for rank in range(2)]

    read.folder = folder
    return read


def factors(folder):
    return Adapter.read(folder).factors


def assert_same_factors(got, want, tolerance=0.0):
    got, want = factors(got), factors(want)
    assert list(got) == list(want)
    for name, pair in want.items():
        for a, b in zip(got[name], pair, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_trained_alike(case, found):
    # losses of about 4.6; updates of the factors relative to how far training has moved them
    limits = (5e-3, 0.2) if "bf16" in case else (5e-5, 1e-4)
    assert found["moved"] > 0.01, case
    assert found["loss"] <= limits[0] and found["off"] <= limits[1], (case, found)


@pytest.mark.parametrize("work", ["fsdp2_training", "ddp_training"])
def test_training_is_that_of_one_process(results, work):
    first, second = results(work)
    assert first == second
    for case, found in first.items():
        assert_trained_alike(case, found)


def test_factors_that_learn_within_their_directions(results):
    for found in results("null_basis"):
        for name in ("merged", "saved"):
            assert found.pop(name) <= 1e-5, name
        assert len(found) == 6
        for case, figures in found.items():
            assert_trained_alike(case, figures)


def test_fsdp1_trains_and_saves_whole_parameters_only(results):
    for found in results("fsdp1_training"):
        for freeze_a in (True, False, None):
            assert found[str(freeze_a)] <= 5e-6
            assert "FSDP1 has flattened them: call this inside" in found[f"save {freeze_a}"]
            name = f"fsdp1.{freeze_a}"
            assert_same_factors(results.folder / name, results.folder / f"{name}.one", 1e-5)
        assert "flattened by FSDP1" in found["merge"]
    assert not (results.folder / "never").exists()


def test_sharded_adapters_are_saved_whole_by_the_first_process(results):
    first, second = results("saving")
    for name in ("True", "False", "peft.True", "peft.False"):
        assert first[f"{name} written"] and second[f"{name} written"]
        assert first[f"{name} again"].startswith("FileExistsError")
        assert second[f"{name} again"].startswith(
            "OtherProcessFailed: Stopped because process 0 failed with FileExists"
        )
        assert_same_factors(results.folder / name, results.folder / f"{name}.one")
        for file in ("adapter_config.json", "lora_null.json"):
            assert (results.folder / name / file).read_text() == (results.folder / f"{name}.one" / file).read_text()
    assert "holds NaN or Inf, so it was not saved" in first["nan save"] and "OtherProcessFailed" in second["nan save"]
    assert "nothing was merged" in first["nan merge"] and "nothing was merged" in second["nan merge"]


def test_a_wrapped_model_is_saved_under_its_own_names(results):
    assert_same_factors(results.folder / "ddp", results.folder / "plain")


def test_sharded_models_merge(results):
    for found in results("merging"):
        for case in ("layers", "root only"):
            assert found[f"{case} left"] == 0
            assert found[case] <= 2e-6 and found[f"{case} weights"] <= 1e-7, (case, found)


def test_adapters_are_attached_before_sharding(results):
    for found in results("refusals"):
        for wish in ("initialize", "load_adapter", "peft"):
            assert "is a DTensor: the model is sharded already" in found[wish], found[wish]
        assert found["changed"] == 0


def test_a_mistake_in_one_process_does_not_leave_the_other_waiting(results):
    first, second = results("refusals")
    assert second["one process"].startswith("ValueError: r=400 is larger")
    assert first["one process"].startswith(
        "OtherProcessFailed: Stopped because process 1 failed with ValueError: r=400"
    )


def test_training_goes_on_from_full_state_dicts(results):
    for found in results("continuing"):
        want, got = found["losses"]
        assert want == got and found["off"] == 0


def test_other_factors_in_the_shards_are_noticed(results):
    for found in results("other_factors"):
        assert found["changed"] > 0.1 and found["off"] <= 5e-6


def test_sharing_groups_compute_each_projection_once_where_factors_stay(results):
    # two layers: 7 adapters, of which q, k, v read one tensor and gate, up another
    for found in results("projections"):
        assert found == {"ddp": 2 * 4, "fsdp2": 2 * 7, "fsdp2, frozen A ignored": 2 * 4}


def test_tensor_parallel_layers_placed_by_hand(results):
    for found in results("tensor_parallel"):
        for name in ("gate_proj", "down_proj"):
            assert max(found[name]) <= 5e-6, found
            assert "a DTensor is sharded" in found[f"{name} strict"]


def test_sharded_models_calibrate_in_step_or_not_at_all(results):
    for found in results("calibrating"):
        assert found["off"] <= 1e-6
        assert "the processes have [3, 2] batches" in found["uneven"]
        assert "the processes have [None, None] batches" in found["unknown"]
        for name in ("checkpoint", "low memory"):
            assert "calibrate before sharding" in found[name]


def test_accelerate_shards_the_adapters(results):
    for found in results("with_accelerate"):
        assert found.pop("kind") == "DTensor"
        assert_trained_alike("accelerate", found)
    export_adapter(results.folder / "checkpoint", results.folder / "exported")
    assert_same_factors(results.folder / "exported", results.folder / "accelerate")
