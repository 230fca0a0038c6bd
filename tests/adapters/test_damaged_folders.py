"""Adapter folders damaged in hundreds of ways: each is refused in one sentence, or loads as written."""

import json
import os
import random
import re
import shutil

import pytest
import torch
from adapter_tools import trained
from safetensors.torch import load_file, save_file
from tiny_models import make_llama

import lora_null
from lora_null.adapters import export_adapter
from lora_null.adapters.files import Adapter

WEIGHTS, CONFIG, OWN = "adapter_model.safetensors", "adapter_config.json", "lora_null.json"
VALUES = [None, True, -1, 0, 3, 10**400, 1e308, -0.5, "x", "", "\ud800", [], [1], {}, {"a": 1}, [["q_proj"]]]
TEXTS = [
    "",
    "[" * 100_000,
    "{}",
    "[]",
    "null",
    "NaN",
    '{"r": NaN}',
    '{"r": 1e999}',
    '{"r": ' + "9" * 5000 + "}",
    "\x00",
]
DTYPES = [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]


def flip(path, rng):
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 3])):
        # half of them in the header, where there is one
        place = rng.randrange(min(len(data), rng.choice([600, len(data)])))
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path, rng):
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))] + rng.choice([b"", b"\0" * 8, rng.randbytes(40)]))


def text(path, rng):
    path.write_text(rng.choice(TEXTS))


def entry(path, rng):
    path = path.with_name(rng.choice([CONFIG, OWN]))
    values = json.loads(path.read_text())
    inner = values["config"] if path.name == OWN and rng.random() < 0.5 else values
    key = rng.choice(sorted(inner))
    if rng.random() < 0.2:
        del inner[key]
    else:
        inner[key] = rng.choice(VALUES)
    path.write_text(json.dumps(values))


def tensor(path, rng):
    tensors = load_file(path.with_name(WEIGHTS))
    key = rng.choice(sorted(tensors))
    change = rng.randrange(5)
    if change == 0:
        tensors[key] = tensors[key].to(rng.choice(DTYPES))
    elif change == 1:
        tensors[key][0, 0] = rng.choice([float("nan"), float("inf")])
    elif change == 2:
        tensors[key] = rng.choice(
            [tensors[key][:-1], tensors[key][:, :-1], tensors[key][None], tensors[key][0]]
        ).clone()
    elif change == 3:
        tensors[key + "x"] = tensors.pop(key)
    else:
        tensors[key][0, 0] += 1
    save_file(tensors, path.with_name(WEIGHTS))


def replaced(path, rng):
    path.unlink()
    kind = rng.randrange(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to("/dev/zero")
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.symlink_to("nowhere")
    else:
        with open(path, "wb") as file:
            file.truncate(2**36)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two folders of ours, A frozen and A trained, and one of another program."""
    folder, batches = tmp_path_factory.mktemp("saved"), [torch.arange(96).reshape(4, 24)] * 2
    for name, freeze_a in (("frozen", True), ("trained", False)):
        lora_null.save_adapter(trained(make_llama, lambda: batches, freeze_a=freeze_a), folder / name)
    shutil.copytree(folder / "frozen", folder / "foreign")
    (folder / "foreign" / OWN).unlink()
    return folder


def outcome(saved, work, seed):
    """Damage a folder, and read it: "refused", "loaded", or what went wrong."""
    rng = random.Random(seed)
    kind = rng.choice(["frozen", "trained", "foreign"])
    folder = work / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved / kind, folder)
    damage = rng.choice([flip, flip, flip, cut, text, entry, tensor, replaced])
    try:
        damage(folder / rng.choice(sorted(entry.name for entry in folder.iterdir())), rng)
    except FileNotFoundError:  # an entry of a file that a foreign folder lacks
        return "unchanged"
    try:
        got, want = Adapter.read(folder), Adapter.read(saved / kind)
        model = lora_null.load_adapter(make_llama(), folder, is_trainable=True)
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    except (ValueError, OSError) as error:
        clear = str(folder) in str(error) and re.search("expected|[Ss]ave|belongs|Load it with|Install", str(error))
        return "refused" if clear else f"unclear: {error}"
    except Exception as error:
        return f"raw: {type(error).__name__}: {str(error)[:200]}"
    # nothing tells of a changed number in a file that carries no checksum
    same = kind == "foreign" or (
        got.factors.keys() == want.factors.keys()
        and all(map(torch.equal, sum(got.factors.values(), ()), sum(want.factors.values(), ())))
        and got.recipe == want.recipe
        and got.state in (want.state, None)
    )
    return "loaded" if same else "silent"


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_damage_is_refused_or_does_no_harm(saved, tmp_path, first):
    outcomes = {seed: outcome(saved, tmp_path, seed) for seed in range(first, first + 50)}
    assert set(outcomes.values()) <= {"refused", "loaded", "unchanged"}, outcomes
    assert "refused" in outcomes.values() and "loaded" in outcomes.values()


@pytest.mark.parametrize("damage", [flip, cut, text, entry, tensor, replaced], ids=lambda damage: damage.__name__)
def test_every_kind_of_damage_is_seen(saved, tmp_path, damage):
    """A damage that nothing ever refuses would test nothing."""
    for seed in range(40):
        rng = random.Random(seed)
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        shutil.copytree(saved / "frozen", tmp_path / "adapter")
        damage(tmp_path / "adapter" / rng.choice([WEIGHTS, CONFIG]), rng)
        try:
            Adapter.read(tmp_path / "adapter")
        except (ValueError, OSError):
            return
    pytest.fail("nothing was refused")


def test_a_folder_says_that_its_files_do_not_belong_together(saved, tmp_path):
    shutil.copytree(saved / "frozen", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    renamed = {**config, "base_model_name_or_path": "somebody/model", "inference_mode": False}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(renamed))
    Adapter.read(tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    readers = (
        lambda: lora_null.load_adapter(make_llama(), tmp_path / "adapter"),
        lambda: lora_null.peft.load_trainable(make_llama(), tmp_path / "adapter"),
        lambda: export_adapter(tmp_path / "adapter", tmp_path / "exported"),
    )
    for read in readers:
        with pytest.raises(ValueError, match=r"adapter_config\.json is damaged, or was changed .* delete .*lora_null"):
            read()
    (tmp_path / "adapter" / OWN).unlink()
    assert Adapter.read(tmp_path / "adapter").scaling_of("any") == 2


@pytest.mark.parametrize(
    "change",
    [{"lora_A": (3, 48)}, {"lora_B": (48, 3)}, {"initial_A": (4, 47)}, {"lora_B": None}, {"lora_A": torch.int32}],
    ids=str,
)
def test_a_checkpoint_with_factors_that_do_not_fit_is_not_exported(tmp_path, change):
    shapes = {"lora_A": (4, 48), "lora_B": (48, 4), "initial_A": (4, 48), "initial_B": (48, 4), **change}
    dtype = next((value for value in change.values() if isinstance(value, torch.dtype)), torch.float32)
    tensors = {
        f"layers.0.q.{part}.weight": torch.ones(shape if isinstance(shape, tuple) else (4, 48)).to(dtype)
        for part, shape in shapes.items()
        if shape is not None
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"(of one rank r|is incomplete|as I32; expected).*[Ss]ave"):
        export_adapter(tmp_path, tmp_path / "exported")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "..", "", 7, None])
def test_an_index_names_files_beside_it_only(tmp_path, name):
    (tmp_path / "checkpoint").mkdir()
    index = tmp_path / "checkpoint" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"q.lora_A.weight": name}}))
    with pytest.raises(ValueError, match=r"index\.json names .*; expected names of files beside it"):
        export_adapter(tmp_path / "checkpoint", tmp_path / "exported")
