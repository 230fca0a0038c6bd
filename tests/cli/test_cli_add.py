"""Files of covariances added on the command line."""

import pytest
import torch

from lora_null import Covariances


def covariances(path, seed, names=("a", "b")):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(20, 5, generator=generator)
    Covariances({"a": X.T @ X}, {"a": names}, {"a": 20}, {"data": str(seed)}).save(path)
    return X.T @ X


@pytest.fixture
def files(tmp_path):
    return tmp_path, [covariances(tmp_path / str(seed), seed) for seed in range(3)]


def test_files_are_added_with_weights(files, run):
    folder, matrices = files
    code, out, err = run("add", folder / "0", folder / "1", folder / "2", "--output", folder / "sum")
    assert code == 0 and "60 tokens" in out, err
    total = Covariances.load(folder / "sum")
    torch.testing.assert_close(total["b"], sum(matrices), rtol=1e-6, atol=1e-6)
    assert total.metadata["data"] == "0 + 1 + 2" and total.tokens == {"a": 60}
    code, _, err = run("add", folder / "0", folder / "1", "--output", folder / "half", "--weights", "1,0.5")
    assert code == 0, err
    half = Covariances.load(folder / "half")
    torch.testing.assert_close(half["a"], matrices[0] + 0.5 * matrices[1], rtol=1e-6, atol=1e-6)
    assert half.metadata["weight"] == "1 + 0.5"


def test_what_does_not_go_together_is_refused(files, run):
    folder, _ = files
    covariances(folder / "other", 0, ("a", "c"))
    output = ("--output", folder / "sum")
    for arguments, match in (
        (("0", "other"), "other layers"),
        (("0", "1", "--weights", "1,-1"), "cannot be subtracted"),
        (("0", "1", "--weights", "0.5"), "expected 2, one for each text"),
        (("0", "1", "--weights", "one,two"), "expected numbers with commas"),
        (("0", "1", "--weights", "1,1e300"), "from 1e-06 to 1e+06"),
        (("0", "missing"), "no such file"),
    ):
        paths = [folder / part if part in ("0", "1", "other", "missing") else part for part in arguments]
        code, _, err = run("add", *paths, *output)
        assert code == 2 and match in err, err
    assert not (folder / "sum").exists()
    code, _, err = run("add", folder / "0", folder / "1", "--output", folder / "0", "--overwrite")
    assert code == 2 and "one of the files" in err
    for weight in (0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(ValueError, match="expected a positive number"):
            Covariances.load(folder / "0").weighted(weight)
