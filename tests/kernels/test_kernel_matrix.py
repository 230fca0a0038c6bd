"""What `make test-kernels` has recorded, for each version of Triton: sound, and the table is that of the records."""

import json

import kernel_matrix as matrix
import pytest

FILES = sorted(matrix.RESULTS.glob("kernels-triton-*.jsonl"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_ships_is_recorded_as_sound(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["arch"] for row in rows if not row["tried"]} == set(matrix.ARCHITECTURES)
    assert not [(row["arch"], matrix.name_of(row)) for row in rows if matrix.complaints(row)]


def test_a_digest_covers_what_a_kernel_calls(monkeypatch):
    lora_kernels = pytest.importorskip("lora_null.kernels.lora_kernels", exc_type=ImportError)
    kernels = (lora_kernels.outer_kernel, lora_kernels.dy_kernel, lora_kernels.project_kernel)
    before = [matrix.sources(kernel) for kernel in kernels]
    monkeypatch.setattr(lora_kernels, "outer_tile", lora_kernels.store_tile)
    after = [matrix.sources(kernel) for kernel in kernels]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False, True]


def test_the_table_is_that_of_the_records():
    assert len(FILES) >= 2, "Triton 3.6 and the current one"
    assert matrix.PAGE.read_text() == matrix.page(), "run `python tests/support/kernel_matrix.py --table`"


@pytest.mark.parametrize(
    "change, wrong",
    [
        ({}, []),
        ({"stack": 8}, ["spills"]),
        ({"stack": 8, "tried": True}, []),
        ({"shared": 10**6}, ["too much shared memory"]),
        ({"serialised": True}, ["serialised wgmma"]),
        ({"hazards": 1, "tried": True}, ["a write to registers of a running wgmma"]),
    ],
)
def test_complaints(change, wrong):
    row = {"arch": "sm_90", "tried": False, "stack": 0, "spills": 0, "shared": 1000, "serialised": False, "hazards": 0}
    assert matrix.complaints(row | change) == wrong
