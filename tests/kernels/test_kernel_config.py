"""Configurations as data: which entry a call gets, unknown GPUs, and where tuned ones lie."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lora_null.kernels import config, lora, runtime, syrk

pytestmark = pytest.mark.usefixtures("own_tables")


def test_every_table_answers_every_size():
    for path in config.FOLDER.glob("*.json"):
        table = config.shipped(path.stem)
        assert table["arch"] == path.stem
        for kernel, sizes in table["kernels"].items():
            for bits, entries in sizes.items():
                last = entries[-1]
                assert "when" not in last and "TMA" not in last, f"{path.stem} {kernel} {bits}: no last resort"
        for lists in table["dispatch"].values():
            assert all("when" not in entries[-1] for entries in lists.values())


@pytest.mark.parametrize(
    "arch, kibibytes, expected",
    [
        ("sm_90", 227, "sm_90"),
        ("sm_86", 99, "sm_89"),
        ("sm_87", 163, "sm_80"),
        ("sm_103", 227, "sm_100"),
        ("sm_110", 227, "sm_100"),
        ("sm_120 NVIDIA GeForce RTX 5090", 99, "sm_89"),
        ("sm_88", 227, "sm_80"),  # no descriptors before sm_90
        ("sm_75", 64, "default"),
        ("gfx942", 64, "default"),
        ("sm_130", 0, "default"),  # no device tells how much memory it has
    ],
)
def test_unknown_architectures_get_the_table_that_uses_their_memory(monkeypatch, arch, kibibytes, expected):
    monkeypatch.setattr(config, "_shared_memory", lambda name: kibibytes * 1024)
    config.shipped.cache_clear()
    config.table.cache_clear()
    assert config.table(arch)["arch"] == expected
    assert config.table(arch)["shared_memory"] <= max(kibibytes, 64) * 1024
    assert config.launch_config(config.LinearConfig, torch.float32, arch, T=1, d=1, m=1, r=1).BLOCK_T > 0
    config.shipped.cache_clear()


def test_the_rule_finds_the_tables_that_ship():
    """Each architecture without its own file would get a table that another of its size has."""
    known = {path.stem: json.loads(path.read_text()) for path in config.FOLDER.glob("*.json")}
    for name, table in known.items():
        if name != "default":
            assert config.nearest(known, name, table["shared_memory"]) == name


@pytest.mark.parametrize("multiprocessors, wide", [(132, 6144), (114, 5120), (78, 2048)], ids=["SXM", "PCIe", "H20"])
def test_wide_tiles_where_they_fill_the_device(multiprocessors, wide):
    """By hand for 132 multiprocessors: 272 tiles of 128 x 256 fill .69 of three waves at d = 4096, 600 .91 of five."""
    chosen = {
        d: config.launch_config(
            config.SyrkConfig, torch.bfloat16, "sm_90", tma=True, multiprocessors=multiprocessors, T=8192, d=d
        )
        for d in (1024, 2048, 3072, 4096, 5120, 6144, 8192, 14336)
    }
    assert [d for d, c in chosen.items() if c.BLOCK_N == 256] == [d for d in chosen if d >= wide]
    assert chosen[1024].tiles(d=1024) == 36 and chosen[8192].tiles(d=8192) == 1056


def test_the_shipped_tiles_obey_the_arithmetic():
    """At most 128 accumulators a thread, and the stages in flight fit the shared memory that the table counts on.

    The widest tiles are those of the accumulator budget: 128 of them for each of 256 threads, and the largest step of a
    power of two of which four stages fit. In the one loop the operands of a step of the low-rank product, then half of
    the output on its way to memory, lie beside the stages; there are as many of those as that leaves room for.
    """
    for path in config.FOLDER.glob("*.json"):
        table = config.shipped(path.stem)
        for kind in (config.LinearConfig, config.SyrkConfig):
            for bits, entries in table["kernels"][kind.kernel].items():
                for entry in entries:
                    c = config._configured(kind, entry)
                    height, k = (c.BLOCK_T, c.BLOCK_K) if kind is config.LinearConfig else (c.BLOCK_M, c.BLOCK_T)
                    stage = (height + c.BLOCK_N) * k * int(bits) // 8
                    assert height * c.BLOCK_N <= 128 * 32 * c.num_warps
                    assert stage * c.num_stages * c.OCCUPANCY <= table["shared_memory"]
                    if "fill_min" in entry.get("when", {}):
                        assert height * c.BLOCK_N == 128 * 32 * 8 and c.num_warps == 8
                        assert stage * 4 <= table["shared_memory"] < 2 * stage * 4
                        beside = 0
                        if getattr(c, "ONE_LOOP", False):
                            rank = entry["when"]["r_max"]
                            beside = max((height + c.BLOCK_N) * rank, height * c.BLOCK_N // 2) * int(bits) // 8
                        assert c.num_stages == (table["shared_memory"] - beside) // stage


@pytest.mark.parametrize(
    "r, plain, expected", [(16, 1, (True, 4)), (32, 1, (True, 4)), (33, 1, (True, 3)), (64, 1, (True, 3)),
                           (65, 1, (False, 4)), (16, 0, (False, 4))]
)  # fmt: skip
def test_one_loop_where_nothing_follows_the_low_rank_product(r, plain, expected):
    sizes = {"T": 8192, "d": 4096, "m": 4096, "r": r, "plain": plain}
    for arch in ("sm_90", "sm_100"):
        c = config.launch_config(config.LinearConfig, torch.bfloat16, arch, tma=True, multiprocessors=132, **sizes)
        assert (c.ONE_LOOP, c.num_stages) == (expected if arch == "sm_90" else (False, 4))


def test_first_entry_whose_bounds_hold():
    entries = [{"when": {"d_max": 10, "T_min": 5}, "n": 1}, {"when": {"d_max": 20}, "n": 2}, {"n": 3}]
    pick = [config._first(entries, s)["n"] for s in ({"d": 10, "T": 5}, {"d": 10, "T": 4}, {"d": 21}, {})]
    assert pick == [1, 2, 3, 1]


def test_descriptors_only_where_operands_allow():
    syrk, sizes = config.SyrkConfig, {"d": 8192, "T": 8192}
    assert [config.launch_config(syrk, torch.bfloat16, "sm_90", tma=tma, **sizes).TMA for tma in (0, 1)] == [0, 1]


@pytest.mark.parametrize("tiles, steps", [(1, 1), (5, 100), (131, 7), (136, 128), (528, 128), (3192, 3)])
def test_splits_leave_no_part_empty_and_never_cost_more(monkeypatch, tiles, steps):
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: 132)
    splits = runtime.splits_for(tiles, steps, 6, torch.device("cpu"))
    each = -(-steps // splits)
    assert 1 <= splits <= steps and (splits - 1) * each < steps
    rounds = -(-tiles * splits // 132)
    assert rounds * (each + 6 * (splits > 1)) <= -(-tiles // 132) * steps


def test_tuned_data_is_laid_over_the_shipped(tmp_path):
    entry = {"BLOCK_T": 16, "BLOCK_N": 16, "BLOCK_R": 16, "SLICE_STEPS": 1, "num_warps": 1, "num_stages": 1}
    times = [{"product": "forward", "triton_us": 1.0}]
    config.save_tuned("sm_90", {"dispatch": {"linear": times}})
    path = config.save_tuned("sm_90", {"source": "a test", "kernels": {"outer": {"16": [entry]}}})
    assert path == tmp_path / "kernels" / "sm_90.json" and json.loads(path.read_text())["source"] == "a test"
    assert config.launch_config(config.OuterConfig, torch.float16, "sm_90") == config.OuterConfig(**entry)
    shipped = config.shipped("sm_90")["kernels"]
    assert config.table("sm_90")["kernels"]["outer"]["32"] == shipped["outer"]["32"]
    assert config.table("sm_90")["kernels"]["linear"] == shipped["linear"]
    assert config.table("sm_90")["dispatch"]["linear"] == times
    assert not list(path.parent.glob("*.tmp"))


def test_one_cards_data_serve_another_of_its_family_only_until_that_has_its_own(tmp_path):
    first, second = "sm_90 NVIDIA H100 80GB HBM3", "sm_90 NVIDIA H200"

    def entry(warps):
        sizes = {"BLOCK_T": 16, "BLOCK_N": 16, "BLOCK_R": 16, "SLICE_STEPS": 1, "num_stages": 1}
        return {"kernels": {"outer": {"16": [{**sizes, "num_warps": warps}]}}}

    def warps(arch):
        config.table.cache_clear()
        return config.launch_config(config.OuterConfig, torch.bfloat16, arch).num_warps

    path = config.save_tuned(first, entry(1))
    assert path.name == "sm_90_NVIDIA_H100_80GB_HBM3.json"
    shipped = config.shipped("sm_100")["kernels"]["outer"]["16"][0]["num_warps"]
    assert (warps(first), warps(second), warps("sm_100 NVIDIA B200")) == (1, 1, shipped)
    config.save_tuned(second, entry(2))
    assert (warps(first), warps(second)) == (1, 2)


def test_package_loads_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, lora_null.kernels.lora as lora, lora_null.kernels.syrk as syrk, lora_null.kernels.tune\n"
        "assert lora.keep_mask(3, 4, dropout=0.5, seed=1, device='cpu').shape == (3, 4)\n"
        "print(syrk.supported(torch.zeros(2, 2)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "triton" in run.stdout or "cpu" in run.stdout


def test_keep_mask_is_a_fair_and_reproducible_coin():
    first, again = (lora.keep_mask(400, 500, dropout=0.3, seed=7, device="cpu") for _ in range(2))
    other = lora.keep_mask(400, 500, dropout=0.3, seed=8, device="cpu")
    assert torch.equal(first, again)
    n = first.numel()
    sigma = (0.3 * 0.7 / n) ** 0.5
    assert abs(first.double().mean().item() - 0.7) < 4 * sigma
    # two seeds, neighbouring rows and neighbouring columns agree as often as independent coins do
    agree = 0.7**2 + 0.3**2
    bound = 4 * (agree * (1 - agree) / n) ** 0.5
    for a, b in ((first, other), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, other.roll(1, 0))):
        assert abs((a == b).double().mean().item() - agree) < bound


@pytest.mark.parametrize("p, kept", [(0.0, 1.0), (1.0, 0.0)])
def test_keep_mask_at_its_ends(p, kept):
    assert lora.keep_mask(50, 60, dropout=p, seed=1, device="cpu").double().mean().item() == kept


def test_dropout_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"dropout=1.5.*0 to 1"):
        lora.keep_mask(2, 2, dropout=1.5, seed=0, device="cpu")


def test_supported_says_what_is_in_the_way(monkeypatch):
    monkeypatch.setattr(runtime, "unavailable", lambda device: None)
    x, w = torch.zeros(4, 8), torch.zeros(6, 8)
    assert lora.supported(x, w, torch.zeros(3, 8)) is None
    assert "float64" in lora.supported(x.double(), w.double())
    assert "bfloat16" in lora.supported(x.bfloat16(), w)
    assert "float16" in lora.supported(x, w, torch.zeros(3, 8).half())
    assert "column stride" in lora.supported(x[:, ::2], w[:, :4])
    assert "rank 513" in lora.supported(x, w, rank=513)
    assert "2-D" in lora.supported(x[0], w)
    assert "row stride" in syrk.supported(torch.empty_strided((2, 2), (1 << 23, 1), device="meta"))


@pytest.mark.parametrize(
    "legacy, switch, expected",
    [("highest", None, "ieee"), ("high", None, "tf32"), ("highest", "tf32", "tf32"), ("high", "ieee", "ieee")],
)
def test_tf32_follows_whichever_switch_was_used(legacy, switch, expected):
    matmul = torch.backends.cuda.matmul
    before, own = torch.get_float32_matmul_precision(), matmul.fp32_precision
    on_cuda = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    try:
        torch.set_float32_matmul_precision(legacy)
        if switch:
            matmul.fp32_precision = switch
        assert runtime.precision(on_cuda) == expected
    finally:
        torch.set_float32_matmul_precision(before)
        matmul.fp32_precision = own


def test_rows_that_overlap_get_no_descriptor():
    x = torch.zeros(8, 64, dtype=torch.float16)
    assert runtime.aligned(x) and runtime.aligned(x[::2]) and runtime.aligned(x[:, :40])
    assert not runtime.aligned(x[:1].expand(8, 64)), "a gradient that autograd has expanded along the tokens"
    assert not runtime.aligned(x[:, 4:]) and not runtime.aligned(x[:, ::2])
