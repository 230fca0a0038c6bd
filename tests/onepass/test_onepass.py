"""A model on disk becomes the adapter that calibrate, initialize and save_adapter make of it in memory, bit for bit."""

import json
import os
import shutil

import pytest
import torch
from calibration_tools import assert_equal
from safetensors.torch import load_file, save_file

import lora_null
from lora_null import LoraNullConfig
from lora_null.onepass import run

# Tiny products are faster on one thread, and the bits of a sum depend on the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")

FILES = ("adapter_model.safetensors", "adapter_config.json", "lora_null.json")


def batches(count=4):
    """Batches with padding."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        ids = torch.randint(97, (2, 14 + number), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def in_two_steps(folder, data, config, output, dtype="auto", low_memory=False, **options):
    """Write what the model in memory gives; returns the covariances."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    covariances = lora_null.calibrate(model, data, config, progress=False, low_memory=low_memory)
    lora_null.initialize(model, covariances, config, progress=False, **options)
    lora_null.save_adapter(model, output)
    return covariances


def assert_same_folder(one, other):
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


CONFIGS = [
    {"r": 8},
    {"r": 8, "train": "ab", "lora_alpha": 4},
    {"r": 4, "train": "b_in_basis", "energy": 0.5},
    {"r": 4, "energy": 0.3, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}},
    {"r": 4, "layers_to_transform": [0, 1], "use_rslora": True},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_the_way_in_two_steps(llama, tmp_path, config, dtype):
    config = LoraNullConfig(**config)
    # in shards, with a head that is the embedding
    model = llama(dtype, num_hidden_layers=3, tie_word_embeddings=dtype == torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    wanted = in_two_steps(tmp_path / "model", batches(), config, tmp_path / "two", low_memory=True)
    keep = tmp_path / "covariances"
    lora_null.initialize_streaming(
        tmp_path / "model", batches(), config, tmp_path / "one", keep_covariances=keep, progress=False
    )
    assert_same_folder(tmp_path / "one", tmp_path / "two")
    kept = lora_null.Covariances.load(keep)
    assert_equal(kept, wanted)
    assert kept.metadata == wanted.metadata
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "one", "two", "covariances"}


def gemma():
    """Sliding and full attention by turns, an embedding that scales, four norms and a head that is the embedding."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return Gemma3ForCausalLM(config)


def opt():
    """Learned positions, and biases."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 3}
    return OPTForCausalLM(OPTConfig(vocab_size=97, num_attention_heads=2, max_position_embeddings=64, **sizes))


def phi():
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return PhiForCausalLM(PhiConfig(vocab_size=97, **sizes))


@pytest.mark.parametrize("make", [gemma, opt, phi], ids=lambda make: make.__name__)
def test_other_architectures(make, tmp_path):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    config = LoraNullConfig(r=4)
    in_two_steps(tmp_path / "model", batches(), config, tmp_path / "two")
    lora_null.initialize_streaming(tmp_path / "model", batches(), config, tmp_path / "one", progress=False)
    assert_same_folder(tmp_path / "one", tmp_path / "two")


def test_a_task_another_dtype_and_the_checkpoint_of_a_base_model(llama, tmp_path):
    model = llama()
    model.model.save_pretrained(tmp_path / "model")
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert "layers.0.mlp.up_proj.weight" in names  # without the prefix that the names in the model have
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    task = lora_null.calibrate(model, batches(2), progress=False)
    options = {"task": task, "method": "exact", "dtype": "bfloat16", "progress": False}
    config = LoraNullConfig(r=4, target_modules=["up_proj"])
    lora_null.initialize_streaming(tmp_path / "model", batches(), config, tmp_path / "one", **options)
    in_two_steps(tmp_path / "model", batches(), config, tmp_path / "two", "bfloat16", task=task, method="exact")
    assert_same_folder(tmp_path / "one", tmp_path / "two")


def test_a_task_of_other_weights_is_refused(llama, tmp_path):
    llama().save_pretrained(tmp_path / "model")
    config, data = LoraNullConfig(r=4), batches()
    start = (tmp_path / "model", data, config, tmp_path / "one")
    for seed, verify_base in ((0, True), (1, False)):
        task = lora_null.calibrate(llama(seed=seed), batches(2), progress=False)
        lora_null.initialize_streaming(*start, task=task, verify_base=verify_base, overwrite=True, progress=False)
    with pytest.raises(ValueError, match="task covariances were collected on other weights"):
        lora_null.initialize_streaming(*start, task=task, overwrite=True, progress=False)


def test_the_plan_counts_no_weights_among_the_activations(llama, tmp_path):
    from lora_null.calibration.options import Options
    from lora_null.models.settings import Loading
    from lora_null.onepass.initialize import prepare

    llama().save_pretrained(tmp_path / "model")
    options = Options(device="cpu", low_memory=True)
    plan = prepare(str(tmp_path / "model"), [torch.zeros(1, 2).long()], LoraNullConfig(r=4), options, Loading()).plan
    sizes = {item.what.split(" of ")[0]: item.size for item in plan.phases[0].items}
    assert sizes["weights"] == 4 * (48 * (2 * 48 + 2 * 24 + 3 * 80) + 2 * 48)
    assert 0 < sizes["activations"] < sizes["weights"] / 4


def test_layers_without_tokens_get_no_adapter(tmp_path, caplog):
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=97,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=1,
        shared_expert_intermediate_size=12,
        **sizes,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    wanted = LoraNullConfig(r=4)
    try:
        lora_null.initialize_streaming(tmp_path / "model", batches(), wanted, tmp_path / "one", progress=False)
    except ValueError as error:
        # experts that transformers fuses as it loads them lie in the files one by one
        assert "under this name" in str(error) and not (tmp_path / "one").exists()
        return
    in_two_steps(tmp_path / "model", batches(), wanted, tmp_path / "two")
    assert_same_folder(tmp_path / "one", tmp_path / "two")


def test_what_is_refused_is_refused_before_anything_is_written(llama, tmp_path):
    llama().save_pretrained(tmp_path / "model")
    data = batches()

    small = LoraNullConfig(r=4)

    def refused(match, *, data=data, config=small, error=ValueError, folder=tmp_path / "model", **options):
        with pytest.raises(error, match=match):
            lora_null.initialize_streaming(folder, data, config, tmp_path / "out", progress=False, **options)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.work").exists()

    refused(r"are needed on cpu, and 1\.0 KiB may be used", memory_limit=1024)
    refused("r=64 is larger than d=48", config=LoraNullConfig(r=64))
    refused("modules_to_save", config=LoraNullConfig(r=4, modules_to_save=["embed_tokens"]))
    refused("lie outside of model.layers", config=LoraNullConfig(r=4, target_modules=["lm_head", "q_proj"]))
    refused("token ids 97", data=[torch.tensor([[97]])])
    refused("No token counts", data=[{"input_ids": data[0]["input_ids"], "attention_mask": torch.zeros(2, 14).long()}])
    refused("model is a LlamaForCausalLM", folder=llama(), error=TypeError)
    (tmp_path / "empty").mkdir()
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "empty")
    refused("neither model.safetensors nor", folder=tmp_path / "empty")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    for change, match in (({}, "no such tensor"), ({name: torch.zeros(3, 48)}, r"it as \(3, 48\)")):
        save_file({k: v for k, v in tensors.items() if k != name} | change, tmp_path / "empty" / "model.safetensors")
        refused(match, folder=tmp_path / "empty")
    shutil.copytree(tmp_path / "model", tmp_path / "patched")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "patched" / "config.json").write_text(json.dumps({**config, "lora_null": {"format": 1}}))
    refused("checkpoint of a model patched", folder=tmp_path / "patched")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "patched" / "config.json").write_text(json.dumps(config))
    refused("is quantised", folder=tmp_path / "patched")


def test_a_weight_that_is_not_finite_is_named(llama, tmp_path):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.(up|down)_proj"):
        lora_null.initialize_streaming(
            tmp_path / "model", batches(), LoraNullConfig(r=4), tmp_path / "out", progress=False
        )
    assert not (tmp_path / "out").exists()


def test_nothing_of_the_model_stays_in_memory_between_its_layers(llama, tmp_path, monkeypatch):
    from lora_null.onepass.run import OnePass

    llama(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    seen = []
    solved = OnePass._solved

    def watched(self, number, covariances):
        present = [name for name, tensor in self.model.named_parameters() if not tensor.is_meta]
        seen.append((number, {name.split(".layers.")[1].split(".")[0] for name in present if ".layers." in name}))
        assert all(".layers." in name for name in present)
        return solved(self, number, covariances)

    monkeypatch.setattr(OnePass, "_solved", watched)
    lora_null.initialize_streaming(tmp_path / "model", batches(), LoraNullConfig(r=4), tmp_path / "out", progress=False)
    assert seen == [(number, {str(number)}) for number in range(4)]


class TestCommand:
    def test_equals_calibrate_and_init(self, calibrated_folder, run):
        folder = calibrated_folder
        assert run("init", folder / "model", folder / "cov", folder / "two", "--r", 4)[0] == 0
        init = ("init", folder / "model", folder / "one", "--data", folder / "text.txt", "--r", 4)
        code, out, err = run(*init, "--keep-covariances", folder / "kept")
        assert code == 0 and "is_trainable=True" in out, err
        assert_same_folder(folder / "one", folder / "two")
        assert_equal(lora_null.Covariances.load(folder / "kept"), lora_null.Covariances.load(folder / "cov"))
        named = ("init", folder / "model", folder / "three", "--covariances", folder / "cov", "--r", 4)
        assert run(*named)[0] == 0
        assert_same_folder(folder / "three", folder / "two")
        code, _, err = run(*init)
        assert code == 2 and "--overwrite" in err
        assert run(*init, "--overwrite")[0] == 0

    def test_takes_the_options_of_texts_and_says_the_plan(self, folder, run):
        init = ("init", folder / "model", folder / "one", "--data", folder / "text.txt", "--r", 4)
        before = sorted(folder.rglob("*"))
        code, out, _ = run(*init, "--dry-run", "--max-tokens", 100, "--batch-size", 2, "--accumulate", "fp64")
        assert code == 0 and "null spaces are solved" in out and "float64" in out and "40 positions" in out
        assert sorted(folder.rglob("*")) == before

    def test_refuses_what_does_not_go_together(self, folder, run):
        model, out = folder / "model", folder / "one"
        for arguments, match in (
            ((out,), "to be made from nothing"),
            ((folder / "cov", out, "--data", folder / "text.txt"), "to be made from"),
            ((folder / "cov", out, "--dry-run"), "go with --data"),
            ((out, "--data", folder / "text.txt", "--device-map", "auto"), "device_map is 'auto'"),
            ((out, "--data", folder / "nowhere"), "no such file"),
        ):
            code, _, err = run("init", model, *arguments)
            assert code == 2 and match in err, err
        assert not out.exists()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked")
def test_the_next_layer_is_read_ahead(llama, tmp_path, monkeypatch):
    """Its weights and nothing else, before the layer at work has got its adapters."""
    llama(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    asked, real = [], run.LayerFiles.write

    def note(_, first, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append(content[first : first + size])

    monkeypatch.setattr(os, "posix_fadvise", note)
    monkeypatch.setattr(run.LayerFiles, "write", lambda *a: (asked.append(a[1]), real(*a)))
    config = LoraNullConfig(r=4)
    lora_null.initialize_streaming(tmp_path / "model", batches(), config, tmp_path / "a", progress=False)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    groups, numbers = [[]], []
    for entry in asked:
        if isinstance(entry, bytes):
            groups[-1].append(entry)
        else:
            numbers.append(entry)
            groups.append([])
    of_layer = [sorted(w.numpy().tobytes() for n, w in weights.items() if f".layers.{i}." in n) for i in range(3)]
    assert numbers == [0, 1, 2] and [sorted(group) for group in groups] == [of_layer[1], of_layer[2], [], []]


def test_texts_are_tokenised_with_the_models_own_tokenizer(folder):
    texts = (folder / "text.txt").read_text().split("\n\n")
    lora_null.initialize_streaming(folder / "model", texts, LoraNullConfig(r=4), folder / "one", progress=False)
    assert (folder / "one" / FILES[0]).exists()
