"""``evaluate`` against plain torch, for every kind of adapter, and what it leaves behind."""

import json

import pytest
import torch
from evaluation_tools import questions, texts, tuned

import lora_null
from lora_null.evaluation import choices, compare, documents, metrics

ADAPTERS = ("frozen A", "trained A", "peft", "peft frozen A", "peft trained A", "injected", "base")


def plain(model, untouched, tokenizer, documents):
    """Sums over all documents, one at a time in float64: before, after, divergence, agreement and tokens."""
    sums = torch.zeros(5, dtype=torch.float64)
    for text in documents:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (untouched, model))
        truth = ids[0, 1:, None]
        sums += torch.stack(
            [
                -p.gather(1, truth).sum(),
                -q.gather(1, truth).sum(),
                (p.exp() * (p - q)).sum(),
                (p.argmax(1) == q.argmax(1)).double().sum(),
                torch.tensor(len(truth), dtype=torch.float64),
            ]
        )
    return sums


@pytest.mark.parametrize("kind", ADAPTERS)
def test_text_agrees_with_plain_torch(kind, tokenizer):
    model, base, untouched = tuned(kind)
    found = lora_null.evaluate(model, tokenizer, keep=texts(), base=base, batch_size=3, progress=False).keep
    before, after, kl, agreement, tokens = plain(model, untouched, tokenizer, texts()).tolist()
    assert (found.documents, found.tokens) == (7, tokens)
    assert found.cross_entropy.before.value == pytest.approx(before / tokens, abs=1e-6)
    assert found.cross_entropy.after.value == pytest.approx(after / tokens, abs=1e-6)
    assert found.kl.value == pytest.approx(kl / tokens, abs=1e-6)
    assert found.agreement.value == pytest.approx(agreement / tokens, abs=1e-12)
    assert found.kl.value > 1e-3


@pytest.mark.parametrize("kind", ["frozen A", "peft trained A", "base"])
def test_questions_agree_with_plain_torch(kind, tokenizer):
    model, base, untouched = tuned(kind)
    asked = questions()
    found = lora_null.evaluate(model, tokenizer, questions=asked, base=base, batch_size=3, progress=False).questions

    def score(m, question, choice):
        prompt, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
        with torch.no_grad():
            log_p = m(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return sum(float(log_p[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))

    for kind_name, chosen in (("", asked), ("a", asked[::2]), ("b", asked[1::2])):
        part = found.by_kind[kind_name] if kind_name else found
        assert part.questions == len(chosen)
        for m, when in ((untouched, "before"), (model, "after")):
            scores = [[score(m, q["question"], choice) for choice in q["choices"]] for q in chosen]
            right = [row.index(max(row)) == q["answer"] for row, q in zip(scores, chosen, strict=True)]
            truth = [row[q["answer"]] for row, q in zip(scores, chosen, strict=True)]
            assert getattr(part.accuracy, when).value == pytest.approx(sum(right) / len(chosen))
            assert getattr(part.log_likelihood, when).value == pytest.approx(sum(truth) / len(chosen), abs=5e-6)
            p, labels = torch.tensor(scores).softmax(1), torch.tensor([q["answer"] for q in chosen])
            expected = metrics.scores(p, labels)
            for name in ("nll", "ece", "brier"):
                assert getattr(getattr(part, name), when).value == pytest.approx(getattr(expected, name), abs=5e-6)
            assert [b.share for b in part.reliability[when]] == [b.share for b in metrics.reliability(p, labels)]


def test_questions_may_have_different_numbers_of_choices():
    answers = choices.Answers.of([torch.tensor([-1.0, -900.0]), torch.tensor([-3.0, -2.0, -4.0])], [1, 1])
    assert answers.accuracy().tolist() == [0, 1] and answers.log_likelihood().tolist() == [-900, -2]
    second = torch.tensor([-3.0, -2.0, -4.0], dtype=torch.float64).softmax(0)
    # 899 nats are beyond what a probability in float64 can say.
    assert answers.nll().tolist() == pytest.approx([899, -float(second[1].log())])
    assert answers.brier().tolist() == pytest.approx([2, float((second**2).sum() - 2 * second[1] + 1)])
    assert answers.gaps().sum(1).tolist() == pytest.approx([1, float(second[1]) - 1])


def test_only_the_completion_of_a_task_counts(tokenizer):
    model, _, untouched = tuned("frozen A")
    prompt, completion = "w1 w2 w3 w4", " w5 w6 w7"
    task = [{"prompt": prompt, "completion": completion}]
    found = lora_null.evaluate(model, tokenizer, task=task, progress=False).task
    ids = torch.tensor([tokenizer(prompt + completion)["input_ids"]])
    with torch.no_grad():
        log_p = untouched(ids).logits[0].double().log_softmax(-1)
    expected = -sum(float(log_p[i - 1, ids[0, i]]) for i in (4, 5, 6)) / 3
    assert found.tokens == 3 and found.cross_entropy.before.value == pytest.approx(expected, abs=1e-6)


def test_windows_score_every_token_once_with_the_context_that_fits(tokenizer):
    model, _, untouched = tuned("frozen A")
    long = " ".join(f"w{i % 90}" for i in range(23))
    found = lora_null.evaluate(model, tokenizer, keep=[long], sequence_length=8, progress=False).keep
    ids = torch.tensor(tokenizer(long)["input_ids"])
    total = 0.0
    for start in range(0, 22, 7):
        piece = ids[start : start + 8]
        with torch.no_grad():
            total += float(
                torch.nn.functional.cross_entropy(untouched(piece[None]).logits[0, :-1], piece[1:], reduction="sum")
            )
    assert found.tokens == 22 and found.cross_entropy.before.value == pytest.approx(total / 22, abs=1e-6)
    assert found.kl.low is None  # one document


def test_memory_is_bounded_by_chunks_of_logits(tokenizer, monkeypatch):
    """No forward pass returns, and no logarithm is taken of, more logits than the bounds say."""
    model, _, _ = tuned("frozen A")
    whole = lora_null.evaluate(model, tokenizer, keep=texts(), progress=False).keep
    forwards, chunks = [], []
    monkeypatch.setattr(compare, "FORWARD_LOGITS", 97 * 40)
    monkeypatch.setattr(compare, "CHUNK_LOGITS", 97 * 5)
    logits_of, log_probabilities = compare.logits_of, compare.log_probabilities

    def forward(*args):
        forwards.append(logits_of(*args))
        return forwards[-1]

    def chunk(*args):
        chunks.append(log_probabilities(*args))
        return chunks[-1]

    monkeypatch.setattr(compare, "logits_of", forward)
    monkeypatch.setattr(compare, "log_probabilities", chunk)
    parts = lora_null.evaluate(model, tokenizer, keep=texts(), progress=False).keep
    assert max(logits.numel() for logits in forwards) <= 97 * 40 < sum(logits.numel() for logits in forwards)
    assert max(logits.numel() for logits in chunks) <= 97 * 5
    assert parts.kl.value == pytest.approx(whole.kl.value, abs=1e-7)


@pytest.mark.parametrize("kind", ["frozen A", "trained A", "peft", "peft trained A", "injected"])
def test_leaves_nothing_behind(kind, tokenizer):
    model, _, _ = tuned(kind)
    model.train()
    for module in list(model.modules())[-3:]:
        module.eval()
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)

    def state():
        return (
            [(n, p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()],
            {n: t.clone() for n, t in model.state_dict().items()},
            [m.training for m in model.modules()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            torch.random.get_rng_state().tolist(),
        )

    before, ids = state(), torch.arange(20)[None]
    logits = model.eval()(input_ids=ids).logits.detach()
    for module, training in zip(model.modules(), before[2], strict=True):
        module.training = training
    lora_null.evaluate(model, tokenizer, keep=texts(), questions=questions(), progress=False)
    after = state()
    assert before[0] == after[0] and before[2:] == after[2:]
    assert all(torch.equal(tensor, after[1][name]) for name, tensor in before[1].items())
    assert torch.equal(model.eval()(input_ids=ids).logits, logits)


def test_result_is_plain_json_and_repeats(tokenizer):
    model, _, _ = tuned("frozen A")
    first, second = (
        lora_null.evaluate(model, tokenizer, keep=texts(), task=texts(), questions=questions(), progress=False)
        for _ in range(2)
    )
    assert first == second
    values = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    assert values["keep"]["cross_entropy"]["change"]["value"] == first.forgetting
    assert values["questions"]["by_kind"].keys() == {"a", "b"}
    assert values["settings"] == {"sequence_length": 512, "resamples": 2000, "seed": 0}


def test_files_hold_what_lists_hold(tokenizer, tmp_path):
    model, _, _ = tuned("frozen A")
    (tmp_path / "keep.txt").write_text("\n\n".join(texts()))
    pairs = [{"prompt": "w1 w2", "completion": " w3 w4"}, {"prompt": "w5", "completion": " w6"}]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions())) + "\n")
    listed = lora_null.evaluate(model, tokenizer, keep=texts(), task=pairs, questions=questions(), progress=False)
    read = lora_null.evaluate(
        model,
        tokenizer,
        keep=tmp_path / "keep.txt",
        task=str(tmp_path / "task.jsonl"),
        questions=tmp_path / "q.jsonl",
        progress=False,
    )
    assert read == listed


def test_windows_share_one_token():
    document = documents.Document(tuple(range(10)), scored_from=5)
    cut = documents.windows([document], 4)
    assert [(w.ids, w.scored_from) for w in cut] == [((3, 4, 5, 6), 2), ((6, 7, 8, 9), 1)]
