"""The file format of covariances: what is kept, what is refused, what survives an interruption."""

import copy
import json
import os
import pickle
import struct

import pytest
import torch

from lora_null import Covariances
from lora_null.covariances.packed import pack_lower, triangle_side, unpack_lower


def _covariances(dtype=torch.float32, sizes=(5, 1, 8)):
    generator = torch.Generator().manual_seed(0)
    matrices, groups, tokens = {}, {}, {}
    for i, d in enumerate(sizes):
        x = torch.randn(3 * d, d, generator=generator, dtype=dtype)
        matrices[f"layers.{i}.q"] = x.T @ x
        matrices[f"layers.{i}.q"].copy_(matrices[f"layers.{i}.q"].tril() + matrices[f"layers.{i}.q"].tril(-1).T)
        groups[f"layers.{i}.q"] = (f"layers.{i}.q", f"layers.{i}.k")
        tokens[f"layers.{i}.q"] = 3 * d
    return Covariances(matrices, groups, tokens, {"model": "toy"})


@pytest.mark.parametrize("d", [1, 2, 3, 17, 64])
def test_packing_never_reads_the_upper_triangle(d):
    lower = torch.randn(d, d).tril()
    poisoned = lower + torch.full((d, d), torch.nan).triu(1)
    packed = pack_lower(poisoned)
    assert packed.numel() == d * (d + 1) // 2
    assert torch.equal(unpack_lower(packed, symmetric=False), lower)
    assert torch.equal(unpack_lower(packed), lower + lower.tril(-1).T)


@pytest.mark.parametrize("numel", [0, 2, 4, 5, 7, 10**9])
def test_a_number_that_is_no_triangle_is_refused(numel):
    with pytest.raises(ValueError, match="lower triangle"):
        triangle_side(numel)


@pytest.mark.parametrize("d", [1, 2, 4096, 28672, 100_003])
def test_triangle_side_is_exact(d):
    assert triangle_side(d * (d + 1) // 2) == d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_round_trip_is_exact_and_half_the_size(tmp_path, dtype):
    saved = _covariances(dtype, sizes=(5, 1, 300))
    path = tmp_path / "new" / "c.safetensors"
    saved.save(path)
    loaded = Covariances.load(path)
    assert loaded.groups == saved.groups and loaded.tokens == saved.tokens and loaded.metadata == saved.metadata
    assert [key for key, _ in loaded.items()] == list(saved) == loaded.keys()
    for key, matrix in saved.items():
        assert torch.equal(loaded[key], matrix) and loaded[key].dtype == dtype
        assert loaded.size(key) == len(matrix)
    full = sum(matrix.numel() for _, matrix in saved.items()) * dtype.itemsize
    assert path.stat().st_size < 0.55 * full
    assert [entry.name for entry in path.parent.iterdir()] == ["c.safetensors"]


def test_members_find_the_matrix_of_their_group():
    covariances = _covariances()
    assert covariances.group_of("layers.2.k") == "layers.2.q"
    assert covariances["layers.2.k"] is covariances["layers.2.q"]
    assert "layers.2.k" in covariances and "layers.2.v" not in covariances and len(covariances) == 3
    with pytest.raises(KeyError, match=r"layers\.2\.v.*another model"):
        covariances["layers.2.v"]


def test_an_existing_file_is_replaced_only_on_request(tmp_path):
    path = tmp_path / "c.safetensors"
    _covariances().save(path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        _covariances(sizes=(3,)).save(path)
    assert path.read_bytes() == before
    _covariances(sizes=(3,)).save(path, overwrite=True)
    assert len(Covariances.load(path)) == 1


@pytest.mark.parametrize("content", ["text", "empty", "weights", "checkpoint", "damaged", "pipe"])
def test_overwriting_replaces_covariances_and_nothing_else(tmp_path, content):
    from safetensors.torch import save_file

    path = tmp_path / "thesis"
    if content == "weights":
        save_file({"weight": torch.ones(3)}, path)
    elif content == "checkpoint":
        save_file({"weight": torch.ones(3)}, path, metadata={"kind": "lora_null.calibration"})
    elif content == "damaged":
        _covariances().save(path)
        path.write_bytes(path.read_bytes()[:-9])
    elif content == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("three years of work" if content == "text" else "")
    before = None if content == "pipe" else path.read_bytes()
    with pytest.raises(FileExistsError, match=r"thesis exists and is no covariance file.*Choose"):
        _covariances().save(path, overwrite=True)
    assert path.is_fifo() if content == "pipe" else path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_may_be_saved_over_itself(tmp_path):
    path = tmp_path / "c.safetensors"
    _covariances().save(path)
    loaded = Covariances.load(path)
    loaded.save(path, overwrite=True)
    for key, matrix in Covariances.load(path).items():
        assert torch.equal(matrix, loaded[key])


def test_an_interrupted_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    _covariances().save(path)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        _covariances(sizes=(9, 9)).save(path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "empty", "pickle"])
def test_damaged_files_are_named(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    _covariances().save(path)
    data = bytearray(path.read_bytes())
    header = struct.unpack("<Q", data[:8])[0]
    if damage == "cut":
        data = data[:-10]
    elif damage == "flipped":
        data[8 + header + 5] ^= 1
    elif damage == "header":
        data[100] ^= 0xFF
    elif damage == "empty":
        data = bytearray()
    path.write_bytes(data)
    if damage == "pickle":
        torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"c\.safetensors"):
        Covariances.load(path)["layers.0.q"]


def test_any_bit_of_the_header_that_flips_is_noticed(tmp_path):
    path = tmp_path / "c.safetensors"
    _covariances(sizes=(2, 3)).save(path)
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for position in [*range(start), *range(len(data) - 12, len(data))]:
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=r"c\.safetensors"):
                loaded = Covariances.load(path)
                assert [loaded[key] for key in loaded]


def rewritten(path, **metadata):
    """Put other texts into a file's header, with the checksums that older files have."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, content = json.loads(data[8 : 8 + length]), data[8 + length :]
    header["__metadata__"].update(metadata)
    if header["crc32"]["shape"] == [len(header) - 1]:
        content = content[:-4]
        header["crc32"]["shape"][0] -= 1
        header["crc32"]["data_offsets"][1] -= 4
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def test_files_without_a_checksum_of_their_header_are_read(tmp_path):
    path, saved = tmp_path / "c.safetensors", _covariances()
    saved.save(path)
    size = path.stat().st_size
    rewritten(path)
    assert path.stat().st_size < size
    loaded = Covariances.load(path)
    assert all(torch.equal(loaded[key], matrix) for key, matrix in saved.items())


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("groups", "[" * 200_000),
        ("groups", '{"layers.0.q": "layers.0.q"}'),
        ("groups", '["layers.0.q"]'),
        ("tokens", '{"layers.0.q": Infinity, "layers.1.q": 3, "layers.2.q": 24}'),
        ("tokens", '{"layers.0.q": 1e400, "layers.1.q": 3, "layers.2.q": 24}'),
        ("tokens", '{"layers.0.q": -15, "layers.1.q": 3, "layers.2.q": 24}'),
        ("tokens", '{"layers.0.q": true, "layers.1.q": 3, "layers.2.q": 24}'),
        ("tokens", '{"layers.0.q": "15", "layers.1.q": 3, "layers.2.q": 24}'),
        ("tokens", "9" * 5000),
        ("provenance", '{"model": ["toy"]}'),
        ("provenance", "null"),
        ("order", "[1, 2, 3]"),
        ("order", '["layers.0.q", "layers.1.q"]'),
        ("order", '["layers.0.q", "layers.0.q", "layers.1.q"]'),
        ("order", "[" * 200_000),
        ("version", "one"),
    ],
    ids=lambda value: value[:40],
)
def test_headers_of_other_types_and_ranges_are_refused(tmp_path, field, text):
    path = tmp_path / "c.safetensors"
    _covariances().save(path)
    rewritten(path, **{field: text})
    with pytest.raises(ValueError, match=r"c\.safetensors (is damaged|has format)"):
        Covariances.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match=rf"{name} is a pipe, a device or a socket"):
            Covariances.load(tmp_path / name)


def test_foreign_and_newer_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors.*kind None"):
        Covariances.load(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        Covariances.load(tmp_path / "nothing.safetensors")

    path = tmp_path / "c.safetensors"
    _covariances().save(path)
    rewritten(path, version="9")
    with pytest.raises(ValueError, match=r"version 9.*Upgrade"):
        Covariances.load(path)


def test_contradictory_arguments_are_refused():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match=r"same keys.*'b'"):
        Covariances({"a": eye}, {"a": ("a",), "b": ("b",)}, {"a": 1})
    with pytest.raises(ValueError, match="more than one group"):
        Covariances({"a": eye, "b": eye}, {"a": ("a", "c"), "b": ("b", "c")}, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(d, d\)"):
        Covariances({"a": torch.ones(2, 3)}, {"a": ("a",)}, {"a": 1})
    with pytest.raises(ValueError, match="float16"):
        Covariances({"a": eye.half()}, {"a": ("a",)}, {"a": 1})
    for tokens in (float("inf"), float("nan"), -1, None):
        with pytest.raises(ValueError, match="numbers from 0"):
            Covariances({"a": eye}, {"a": ("a",)}, {"a": tokens})
    with pytest.raises(ValueError, match="to strings"):
        Covariances({"a": eye}, {"a": ("a",)}, {"a": 1}, {"batches": 3})


def test_sums_are_those_of_both_texts(tmp_path):
    first, second = _covariances(), _covariances(torch.float64)
    second.metadata.update(model="other", without_tokens='["head"]')
    both = first + second
    assert both.groups == first.groups and both.tokens == {key: 2 * count for key, count in first.tokens.items()}
    assert both.metadata == {"model": "toy + other", "without_tokens": '["head"]'}
    both.save(tmp_path / "both")
    for found in (both, Covariances.load(tmp_path / "both")):
        for key, matrix in found.items():
            assert matrix.dtype == torch.float64
            assert torch.equal(matrix, first[key].double() + second[key])
    assert torch.equal((both + first)["layers.0.k"], both["layers.0.q"] + first["layers.0.q"].double())
    assert (both + first).metadata["model"] == "toy + other"
    with pytest.raises(ValueError, match=r"other layers do not go together: layers.0.q has d=5 and d=6"):
        first + _covariances(sizes=(6, 1, 8))
    with pytest.raises(ValueError, match=r"other layers do not go together: \['layers.2.k', 'layers.2.q'\]"):
        first + _covariances(sizes=(5, 1))
    with pytest.raises(TypeError):
        first + 1


def test_covariances_of_a_file_are_copied_and_pickled(tmp_path):
    saved = _covariances()
    saved.save(tmp_path / "c")
    loaded = Covariances.load(tmp_path / "c")
    pickled = pickle.dumps(loaded + loaded)
    for found in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert (found.groups, found.tokens, found.metadata) == (saved.groups, saved.tokens, saved.metadata)
        assert all(torch.equal(matrix, saved[key]) for key, matrix in found.items())
    assert torch.equal(pickle.loads(pickled)["layers.0.q"], 2 * saved["layers.0.q"])
    _covariances(sizes=(5, 1, 9)).save(tmp_path / "c", overwrite=True)
    assert torch.equal(copy.deepcopy(loaded)["layers.2.q"], saved["layers.2.q"])
    with pytest.raises(ValueError, match=r"another file than the one that was open"):
        pickle.loads(pickled)
