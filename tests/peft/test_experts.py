"""Experts fused into one parameter, through PEFT's target_parameters: calibrate, start, train, save, merge."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from adapter_tools import optimise
from expert_models import BOTH, DECODER, DOWN, MODELS, ids, make, padded, parameters_of
from peft import LoraConfig, PeftModel, get_peft_model
from processes import leave, run_two
from safetensors.torch import load_file

import lora_null
from lora_null import Covariances, LoraNullConfig, null_basis
from lora_null import peft as lora_null_peft
from lora_null.bayes.layers import adapted_layers
from lora_null.models.experts import Routing
from lora_null.models.targets import survey
from lora_null.peft.basis import BasisLinear
from lora_null.peft.layers import expert_layers
from lora_null.system import log

R = 3


def calibrated(kind, count=4, **options):
    config = LoraNullConfig(target_modules=["q_proj"], target_parameters=parameters_of(kind))
    config = options.pop("config", config)
    return lora_null.calibrate(make(kind), [padded(seed) for seed in range(count)], config, progress=False, **options)


def started(kind, covariances, train, **options):
    parameters = list(parameters_of(kind))
    config = LoraConfig(r=R, lora_alpha=5, target_modules=[], target_parameters=parameters, **options)
    model = get_peft_model(make(kind), config)
    return lora_null_peft.initialize_lora_null_weights(
        model, covariances, train=train, energy=0.9 if train == "b_in_basis" else None, progress=False
    )


def learn(model):
    return optimise(model, map(ids, range(2)))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids(99)).logits


def agree(found, expected, bound=2e-5):
    return (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_plan_on_meta_is_the_plan_of_the_model(kind, dtype):
    config = LoraNullConfig(r=R, target_parameters=parameters_of(kind))
    model = make(kind, dtype)
    here = lora_null.memory_plan(model, ids(0), config)
    there = lora_null.memory_plan(model.to("meta"), ids(0), config)
    assert there.total("meta") == here.total("cpu") > 0
    assert [item.what for item in there.items] == [item.what for item in here.items]


def test_one_pass_beside_experts_in_float32(tmp_path):
    make("gpt_oss").save_pretrained(tmp_path / "model")
    config = LoraNullConfig(r=R, train="b")
    lora_null.initialize_streaming(tmp_path / "model", [ids(0)], config, tmp_path / "adapter", progress=False)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(names) == 2 * 2 * 4 and not any("experts" in name for name in names)


@pytest.mark.parametrize("kind", MODELS)
def test_the_whole_way(kind, tmp_path):
    covariances = calibrated(kind, config=LoraNullConfig(target_parameters=parameters_of(kind)))
    before = logits(make(kind))
    matrices = survey(make(kind)).experts
    for train in ("b", "b_in_basis"):
        model = started(kind, covariances, train)
        assert torch.equal(logits(model), before)
        layers = expert_layers(model)
        assert sum(layer.num_experts for layer in layers.values()) == 2 * MODELS[kind][3]
        learn(model)
        after = logits(model)
        assert not agree(after, before, 1e-4)
        for name, layer in layers.items():
            for expert, A in enumerate(layer.lora_A["default"].weight.detach().chunk(layer.num_experts)):
                C = covariances[f"{name}.{expert}"].double()
                assert A.shape == (R, len(C)) == (R, matrices[f"{name}.{expert}"].d)
                if train == "b":
                    rows = torch.linalg.qr(A.double().t()).Q
                    least = torch.linalg.eigvalsh(C)[:R].sum()
                    assert (rows * (C @ rows)).sum() <= least + 1e-9 * C.trace(), name
                else:
                    assert null_basis(C, 0.9).leak(A) < 1e-5, name
        lora_null_peft.save_adapter(model, tmp_path / train)
        assert agree(logits(PeftModel.from_pretrained(make(kind), tmp_path / train)), after)
        again = lora_null_peft.load_trainable(make(kind), tmp_path / train, covariances=covariances)
        assert agree(logits(again), after)
        learning = {name for name, p in again.named_parameters() if p.requires_grad}
        assert learning == {name for name, p in model.named_parameters() if p.requires_grad}
        assert agree(logits(model.merge_and_unload()), after)


def eager_inputs(kind, layer, batches, monkeypatch):
    """Return, by expert, what the down-projections of a layer read where transformers runs one expert at a time."""
    model = make(kind)
    model.config._experts_implementation = "eager"
    down = model.get_submodule(layer).down_proj
    places, found, linear = {part.data_ptr(): e for e, part in enumerate(down)}, {}, torch.nn.functional.linear

    def noting(x, weight, bias=None):
        if weight.data_ptr() in places and weight.shape == down.shape[1:]:
            found.setdefault(places[weight.data_ptr()], []).append(x.detach().double())
        return linear(x, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", noting)
        for batch in batches:
            model(**batch)
    return {expert: torch.cat(rows) for expert, rows in found.items()}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "nemotron_h"])
def test_down_projections_read_what_their_experts_make_of_tokens_that_count(kind, monkeypatch):
    covariances = calibrated(kind, count=3)
    # Padding on the right changes nothing of what comes before it.
    rows = [(b["input_ids"][i], b["attention_mask"][i]) for b in map(padded, range(3)) for i in range(4)]
    alone = [{"input_ids": row[mask.bool()][None]} for row, mask in rows]
    layer = next(name.removesuffix(".down_proj.0") for name in covariances if name.endswith(".down_proj.0"))
    inputs = eager_inputs(kind, layer, alone, monkeypatch)
    assert len(inputs) == 4
    for expert, read in inputs.items():
        name = f"{layer}.down_proj.{expert}"
        assert covariances.tokens[name] == len(read)
        assert (covariances[name].double() - read.t() @ read).norm() <= 1e-5 * (read.t() @ read).norm()


def test_gate_and_up_of_all_experts_share_what_the_layer_reads():
    covariances, model, sums = calibrated("mixtral", count=2), make("mixtral"), torch.zeros(32, 32, dtype=torch.float64)

    def add(_module, args):
        read = args[0][batch["attention_mask"].flatten().bool()].double()
        sums.add_(read.t() @ read)

    model.model.layers[1].mlp.experts.register_forward_pre_hook(add)
    for batch in map(padded, range(2)):
        model(**batch)
    names = [f"model.layers.1.mlp.experts.gate_up_proj.{expert}" for expert in range(4)]
    assert covariances.groups[names[0]] == tuple(names)
    assert covariances.tokens[names[0]] == int(sum(batch["attention_mask"].sum() for batch in map(padded, range(2))))
    assert (covariances[names[3]].double() - sums).norm() <= 1e-5 * sums.norm()


def test_dropped_tokens_do_not_count():
    tokens, experts = torch.zeros(4, 8), torch.tensor([[0, 1], [1, 5], [1, 0], [5, 5]])
    weights = torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    routing = Routing(tokens, experts, weights)
    # Of the third token the first expert has no weight; there are fewer than six of them.
    assert routing.rows_of(0).tolist() == [0, 2]
    assert routing.rows_of(1).tolist() == [0, 1]


def same(found, expected):
    assert found.groups == expected.groups and found.tokens == expected.tokens
    return all(torch.equal(C, expected[key]) for key, C in found.items())


def test_layer_by_layer_and_interrupted_give_the_same_bits(tmp_path):
    expected, config = calibrated("gpt_oss"), LoraNullConfig(target_modules=["q_proj"], target_parameters=BOTH)
    assert same(calibrated("gpt_oss", low_memory=True), expected)

    def cut_off():
        yield from map(padded, range(2))
        raise KeyboardInterrupt

    options = {"checkpoint": tmp_path / "sums", "checkpoint_every": 1, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        lora_null.calibrate(make("gpt_oss"), cut_off(), config, **options)
    whole = calibrated("gpt_oss", checkpoint_every=1)
    assert same(calibrated("gpt_oss", checkpoint=tmp_path / "sums", checkpoint_every=1), whole)


def two_texts():
    """The second is too short to reach all experts."""
    return [padded(0), {"input_ids": ids(1)[:1, :1], "attention_mask": torch.ones(1, 1, dtype=torch.long)}]


def test_processes_add_up_what_reaches_other_experts(tmp_path, one_thread):
    config = LoraNullConfig(target_modules=["q_proj"], target_parameters=BOTH)
    expected = lora_null.calibrate(make("mixtral"), two_texts(), config, progress=False)
    run_two(__file__, tmp_path)
    for rank in range(2):
        found = Covariances.load(tmp_path / f"sums.{rank}")
        assert found.groups == expected.groups and found.tokens == expected.tokens
        for key, C in found.items():
            torch.testing.assert_close(C, expected[key])


def test_the_plan_counts_every_expert_and_no_queue_for_what_they_make():
    config = LoraNullConfig(target_modules=["q_proj"], target_parameters=BOTH)
    plan = lora_null.memory_plan(make("mixtral"), padded(0), config)
    sums = {item.what: item.size for item in plan.items}
    assert sums["8 covariances (16, 16) float32"] == 8 * 16 * 16 * 4
    assert sums["4 covariances (32, 32) float32"] == 4 * 32 * 32 * 4
    assert sums["queues of 4096 tokens"] == 4 * 4096 * 32 * 4
    # On meta nothing says which tokens go to which expert; torch has the product of half precision only there.
    hollow = lora_null.memory_plan(make("mixtral", torch.bfloat16).to("meta"), padded(0), config)
    found = [(item.what, item.size) for item in hollow.items if "covariances" in item.what]
    assert found == [(what, size) for what, size in sums.items() if "covariances" in what]


def test_experts_with_too_few_tokens_are_named_and_pooled(monkeypatch, caplog):
    monkeypatch.setattr(log, "_given", set())
    short = [{"input_ids": ids(0)[:1, :20]}]
    config = LoraNullConfig(target_modules=["q_proj"], target_parameters=BOTH)
    covariances = lora_null.calibrate(make("qwen3_moe"), short, config, progress=False)
    assert "experts saw fewer than 2 tokens per feature" in caplog.text
    names = [f"model.layers.0.mlp.experts.down_proj.{expert}" for expert in range(4)]
    few = [name for name in names if covariances.tokens[name] < 32]
    assert few and all(name in covariances for name in names)
    caplog.clear()
    layer = expert_layers(started("qwen3_moe", covariances, "b"))["model.layers.0.mlp.experts.down_proj"]
    assert few[0] in caplog.text and "sum over all experts" in caplog.text
    total = sum(covariances[name].double() for name in names)
    parts = dict(zip(names, layer.lora_A["default"].weight.chunk(4), strict=True))
    for name, A in parts.items():
        C = total if name in few else covariances[name].double()
        rows = torch.linalg.qr(A.double().t()).Q
        assert (rows * (C @ rows)).sum() <= torch.linalg.eigvalsh(C)[:R].sum() + 1e-9 * C.trace()


def test_covariances_of_texts_that_reach_other_experts_add_up():
    config = LoraNullConfig(target_modules=["q_proj"], target_parameters=BOTH)
    texts = [[{"input_ids": ids(seed)[:1, :2]}] for seed in range(2)]
    one, other = (lora_null.calibrate(make("mixtral"), text, config, progress=False) for text in texts)
    assert {key for key in one if not one.tokens[key]} != {key for key in other if not other.tokens[key]}
    both = lora_null.calibrate(make("mixtral"), [*texts[0], *texts[1]], config, progress=False)
    assert (one + other).tokens == both.tokens
    torch.testing.assert_close((one + other)[key := list(one)[-1]], both[key])


@pytest.mark.parametrize("train", ["b", "b_in_basis"])
def test_beside_linear_layers_in_half_precision(train, tmp_path):
    config = LoraConfig(r=R, lora_alpha=4, target_modules=["q_proj", "v_proj"], target_parameters=list(BOTH))
    covariances = lora_null.calibrate(
        make("qwen3_moe", torch.bfloat16), [padded(0)], LoraNullConfig(target_parameters=BOTH), progress=False
    )
    model = get_peft_model(make("qwen3_moe", torch.bfloat16), config)
    lora_null_peft.initialize_lora_null_weights(model, covariances, train=train, progress=False)
    assert torch.equal(logits(model), logits(make("qwen3_moe", torch.bfloat16)))
    assert len(lora_null_peft.lora_layers(model)) == 4 and len(expert_layers(model)) == 4
    after = logits(learn(model))
    for name, save in (("own", lora_null_peft.save_adapter), ("pefts", lambda m, path: m.save_pretrained(path))):
        save(model, tmp_path / name)
        loaded = PeftModel.from_pretrained(make("qwen3_moe", torch.bfloat16), tmp_path / name)
        assert agree(logits(loaded).float(), after.float(), 1e-2)
        again = lora_null_peft.load_trainable(
            make("qwen3_moe", torch.bfloat16), tmp_path / name, covariances=covariances
        )
        kinds = {type(layer.lora_A["default"]) is BasisLinear for layer in expert_layers(again).values()}
        assert kinds == {train == "b_in_basis"}
    # One rank, and a scaling of one, for readers that know no patterns.
    written = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"] == R and not written["rank_pattern"] and not written["alpha_pattern"]
    names = set(load_file(tmp_path / "own" / "adapter_model.safetensors"))
    assert not any("gate.weight" in name or "coefficients" in name for name in names)


def test_other_weights_are_seen_where_only_experts_differ():
    covariances, model = calibrated("mixtral"), make("mixtral")
    model.model.layers[0].mlp.experts.down_proj.data[2].neg_()
    model = get_peft_model(model, LoraConfig(r=R, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="collected on other weights"):
        lora_null_peft.initialize_lora_null_weights(model, covariances, progress=False)


def test_what_is_not_supported_is_refused_in_words():
    covariances = calibrated("mixtral")
    with pytest.raises(ValueError, match=r"train='ab' is not supported on experts fused.*'b_in_basis' or 'b'"):
        started("mixtral", covariances, "ab")
    config = LoraNullConfig(target_parameters=BOTH)
    with pytest.raises(ValueError, match=r"initialize puts adapters on linear layers.*lora_null.peft"):
        lora_null.initialize(make("mixtral"), covariances, config, progress=False)
    with pytest.raises(ValueError, match=r"adapts the parameter .*such as experts"):
        adapted_layers(started("mixtral", covariances, "b"))
    with pytest.raises(ValueError, match=r"target_parameters is .*experts get no adapter"):
        lora_null.initialize_streaming("nowhere", [], config, "nothing")
    with pytest.raises(
        ValueError, match=r"names 'gate_proj', which is no parameter.*layers\.\*\.mlp\.experts\.down_proj"
    ):
        lora_null.calibrate(make("mixtral"), [], LoraNullConfig(target_parameters=["gate_proj"]))


def test_experts_of_another_kind_are_refused():
    config = transformers.Llama4TextConfig(**DECODER, num_local_experts=2, intermediate_size_mlp=16)
    model = transformers.Llama4ForCausalLM(config)
    with pytest.raises(ValueError, match="fused in a way that is not known here"):
        lora_null.calibrate(model, [], LoraNullConfig(target_parameters=[DOWN]))


def test_experts_that_compute_something_else_are_left_out(caplog):
    model = make("mixtral")
    # As if the activations were of another kind.
    model.model.layers[0].mlp.experts.forward = lambda hidden_states, top_k_index, top_k_weights: hidden_states.flip(-1)
    config = LoraNullConfig(target_modules=["q_proj"], target_parameters=[DOWN])
    covariances = lora_null.calibrate(model, [padded(0)], config, progress=False)
    assert "their output is another than that of gate, up and down" in caplog.text
    assert {name for name in covariances if "experts" in name} == {
        f"model.layers.1.mlp.{DOWN}.{expert}" for expert in range(4)
    }


def test_parameters_without_covariances_stay_as_peft_starts_them(monkeypatch, caplog):
    monkeypatch.setattr(log, "_given", set())
    covariances = calibrated("mixtral", config=LoraNullConfig(target_parameters=["experts.gate_up_proj"]))
    layers = expert_layers(started("mixtral", covariances, "b"))
    assert "hold nothing of 2 parameters" in caplog.text and "down_proj: their adapters stay" in caplog.text
    frozen = {name for name, layer in layers.items() if not layer.lora_A["default"].weight.requires_grad}
    assert frozen == {f"model.layers.{number}.mlp.experts.gate_up_proj" for number in range(2)}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    wish = LoraNullConfig(target_modules=["q_proj"], target_parameters=BOTH)
    sums = lora_null.calibrate(make("mixtral"), two_texts(), wish, shard=True, progress=False)
    sums.save(Path(sys.argv[1]) / f"sums.{dist.get_rank()}")
    leave()
