"""Calibration text from everywhere: conversations, data sets, several texts with weights; and which tokens count."""

import json
import math
import sys

import pytest
import torch

import lora_null
from lora_null import Covariances, LoraNullConfig, text_batches
from lora_null.calibration.batches import BatchReader
from lora_null.calibration.masks import IGNORED_LABEL
from lora_null.calibration.sources import read_texts

# Tiny products are faster on one thread, and the bits of a sum depend on the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")

# w90 opens a message, w91 closes it.
TEMPLATE = (
    "{% for m in messages %}w90 {{ {'system': 'w80', 'user': 'w81', 'assistant': 'w82'}[m['role']] }} "
    "{{ m['content'] }} w91 {% endfor %}"
)
CHAT = [
    {"role": "system", "content": "w1"},
    {"role": "user", "content": "w2 w3"},
    {"role": "assistant", "content": "w4"},
    {"role": "user", "content": "w5"},
    {"role": "assistant", "content": "w6 w7"},
]


@pytest.fixture
def chatting(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def lines(path, *entries):
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def words(text):
    return [int(word[1:]) + 1 for word in text.split()]


def counted(batches, tokenizer):
    """Return the tokens that calibration counts, by its own reading of the masks."""
    from tiny_models import make_llama

    reader, found = BatchReader(make_llama(), "labels" if "labels" in batches[0] else "attention"), []
    for index, item in enumerate(batches):
        batch = reader.read(item, index)
        mask = batch.masks.main
        ids = batch.inputs["input_ids"]
        found += (ids if mask is None else ids[mask]).flatten().tolist()
    return found


class TestConversations:
    def test_they_are_written_by_the_chat_template(self, chatting, tmp_path):
        (batch,) = text_batches(chatting, lines(tmp_path / "a.jsonl", {"messages": CHAT, "prompt": "not this"}))
        whole = "w90 w80 w1 w91 w90 w81 w2 w3 w91 w90 w82 w4 w91 w90 w81 w5 w91 w90 w82 w6 w7 w91"
        assert batch["input_ids"].tolist() == [words(whole)] and "labels" not in batch

    @pytest.mark.parametrize(
        ("roles", "kept"),
        [
            (["assistant"], "w90 w82 w4 w91 w90 w82 w6 w7 w91"),
            (["user"], "w90 w81 w2 w3 w91 w90 w81 w5 w91"),
            (["system", "user"], "w90 w80 w1 w91 w90 w81 w2 w3 w91 w90 w81 w5 w91"),
        ],
    )
    def test_other_roles_are_context_only(self, chatting, tmp_path, roles, kept):
        batches = text_batches(chatting, lines(tmp_path / "a.jsonl", {"messages": CHAT}), roles=roles)
        assert counted(batches, chatting) == words(kept)
        assert batches[0]["input_ids"].shape == (1, 22) and batches[0]["attention_mask"].all()

    def test_the_sums_are_those_of_the_tokens_that_count(self, chatting, tmp_path, llama):
        """Against the inputs of a layer, seen with a hook in one forward pass over the whole conversation."""
        model = llama()
        batches = text_batches(chatting, lines(tmp_path / "a.jsonl", {"messages": CHAT}), roles=["assistant"])
        covariances = lora_null.calibrate(model, batches, mask="labels", progress=False)
        seen = []
        layer = model.model.layers[1].mlp.down_proj
        handle = layer.register_forward_hook(lambda _, args, __: seen.append(args[0][0].double()))
        with torch.no_grad():
            model(input_ids=batches[0]["input_ids"])
        handle.remove()
        rows = seen[0][batches[0]["labels"][0] != IGNORED_LABEL]
        assert set(covariances.tokens.values()) == {9} == {len(rows)}
        found = covariances["model.layers.1.mlp.down_proj"].double()
        torch.testing.assert_close(found, rows.T @ rows, rtol=1e-5, atol=1e-7)

    def test_max_tokens_is_of_those_that_count(self, chatting, tmp_path):
        path = lines(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 9)
        assert len(counted(text_batches(chatting, path, roles=["assistant"], max_tokens=20), chatting)) == 20

    def test_pieces_without_a_token_that_counts_are_left_out(self, chatting, tmp_path):
        path = lines(tmp_path / "a.jsonl", {"messages": CHAT})
        batches = text_batches(chatting, path, roles=["assistant"], sequence_length=5)
        assert sum(len(batch["input_ids"]) for batch in batches) == 4
        assert sorted(counted(batches, chatting)) == sorted(words("w90 w82 w4 w91 w90 w82 w6 w7 w91"))

    def test_documents_beside_them_count_in_whole(self, chatting, tmp_path):
        path = lines(tmp_path / "a.jsonl", {"messages": CHAT[1:3]}, {"text": "w70 w71"})
        found = counted(text_batches(chatting, path, roles=["assistant"]), chatting)
        assert sorted(found) == sorted(words("w90 w82 w4 w91 w70 w71"))

    def test_what_cannot_be_told_apart_is_refused(self, chatting, tmp_path, monkeypatch):
        path = lines(tmp_path / "a.jsonl", {"messages": CHAT})
        with pytest.raises(
            ValueError, match=r"no token that counts.*are assistant, system, user, and counted are tool"
        ):
            text_batches(chatting, path, roles=["tool"])
        # as templates do that drop earlier thoughts
        monkeypatch.setattr(chatting, "chat_template", "{{ messages | length }} " + TEMPLATE)
        with pytest.raises(ValueError, match="writes the first 2 of 5 messages otherwise when more follow"):
            text_batches(chatting, path, roles=["assistant"])
        monkeypatch.setattr(chatting, "chat_template", "{{ raise_exception('roles must alternate') }}")
        with pytest.raises(ValueError, match=r"refuses a conversation of system, user.*\(roles must alternate\)"):
            text_batches(chatting, path)
        monkeypatch.setattr(chatting, "chat_template", None)
        with pytest.raises(ValueError, match="no chat template; expected that of a chat model"):
            text_batches(chatting, path)
        lines(path, {"messages": [{"from": "human", "value": "w1"}]})
        with pytest.raises(ValueError, match=r"a.jsonl, line 1 has \['messages'\]; expected .*role and content"):
            text_batches(chatting, path)


def assert_close(found, wanted):
    """To some roundings of the largest entry."""
    assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max()


class TestWeights:
    @pytest.fixture
    def texts(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        for name, count in (("a", 30), ("b", 12), ("c", 20)):
            rows = torch.randint(96, (count, 20), generator=generator).tolist()
            (tmp_path / name).write_text("\n\n".join(" ".join(f"w{word}" for word in row) for row in rows))
        return [tmp_path / name for name in "abc"]

    WEIGHTS = (1.0, 0.3, 25.0)

    def wanted(self, model, tokenizer, texts):
        found = [lora_null.calibrate(model, text_batches(tokenizer, text), progress=False) for text in texts]
        first, second, third = map(Covariances.weighted, found, self.WEIGHTS)
        return first + second + third

    @pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"queue_tokens": 64}, {"accumulate": "fp64"}])
    def test_texts_with_weights_equal_their_weighted_sum(self, llama, tokenizer, texts, options):
        model = llama()
        batches = text_batches(tokenizer, texts, weights=self.WEIGHTS)
        found = lora_null.calibrate(model, batches, progress=False, **options)
        wanted = self.wanted(model, tokenizer, texts)
        assert found.tokens == wanted.tokens and found.groups == wanted.groups
        assert found.metadata["weight"] == wanted.metadata["weight"] == "1 + 0.3 + 25"
        for key, matrix in wanted.items():
            assert_close(found[key], matrix)

    def test_one_pass_takes_them(self, llama, tokenizer, texts, tmp_path):
        llama().save_pretrained(tmp_path / "model")
        batches = text_batches(tokenizer, texts, weights=self.WEIGHTS)
        config, keep = LoraNullConfig(r=4, train="b"), tmp_path / "cov"
        options = {"keep_covariances": keep, "progress": False}
        lora_null.initialize_streaming(tmp_path / "model", batches, config, tmp_path / "out", **options)
        for key, matrix in self.wanted(llama(), tokenizer, texts).items():
            assert_close(Covariances.load(keep)[key], matrix)

    def test_rows_are_added_as_they_are(self, llama, tokenizer, texts):
        """In bfloat16 rows that are scaled themselves would be rounded to 8 bits, in null directions too."""
        model = llama().bfloat16()
        once = lora_null.calibrate(model, text_batches(tokenizer, texts), progress=False)
        thrice = lora_null.calibrate(model, text_batches(tokenizer, texts, weights=(3, 3, 3)), progress=False)
        assert all(torch.equal(3 * once[key], thrice[key]) for key in once)

    def test_an_interrupted_run_goes_on_to_the_same_bits(self, llama, tokenizer, texts, tmp_path, monkeypatch):
        model = llama()
        batches = text_batches(tokenizer, texts, weights=self.WEIGHTS, batch_size=4)
        options = {"checkpoint_every": 1, "progress": False}
        whole = lora_null.calibrate(model, batches, **options)
        for stop in range(1, len(batches)):

            def until(stop=stop):
                yield from batches[:stop]
                raise KeyboardInterrupt

            path = tmp_path / f"run{stop}"
            with pytest.raises(KeyboardInterrupt):
                lora_null.calibrate(model, until(), checkpoint=path, **options)
            for _ in range(2):  # the second time from a finished one
                found = lora_null.calibrate(model, batches, checkpoint=path, **options)
                assert all(torch.equal(found[key], whole[key]) for key in whole), stop
        changed = [{**batch, "text_weight": 2} for batch in batches]
        with pytest.raises(ValueError, match="belongs to another calibration"):
            lora_null.calibrate(model, changed, checkpoint=path, **options)

    def test_one_mapping_is_cut_with_its_weight(self, llama, token_batches):
        model, ids = llama(), torch.cat(token_batches())
        batch = {"input_ids": ids, "text_weight": 0.25}
        found = lora_null.calibrate(model, batch, queue_tokens=64, progress=False)
        for key, matrix in lora_null.calibrate(model, ids, queue_tokens=64, progress=False).items():
            assert torch.equal(found[key], 0.25 * matrix)

    def test_what_is_no_weight_is_refused(self, llama, tokenizer, texts):
        with pytest.raises(ValueError, match=r"weights are \[1, 2\]; expected 3"):
            text_batches(tokenizer, texts, weights=[1, 2])
        for weight in (0, -1, math.nan, 1e300, "1", True, torch.ones(2)):
            with pytest.raises(ValueError, match="expected a positive number, from 1e-06 to 1e\\+06"):
                text_batches(tokenizer, texts, weights=[1, 2, weight])
            with pytest.raises(ValueError, match="expected a positive number"):
                lora_null.calibrate(llama(), [{"input_ids": [[1, 2]], "text_weight": weight}], progress=False)


ROWS = [{"text": f"w{i} w{i + 1}", "id": i} for i in range(50)]


class TestDataSets:
    @pytest.fixture
    def datasets(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        found = pytest.importorskip("datasets")
        monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        return found

    def test_a_saved_folder_parquet_files_and_a_folder_of_them(self, datasets, tokenizer, tmp_path):
        rows = datasets.Dataset.from_list(ROWS)
        rows.save_to_disk(str(tmp_path / "saved"))
        datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "splits"))
        (tmp_path / "parquet" / "data").mkdir(parents=True)
        rows.to_parquet(tmp_path / "rows.parquet")
        rows.to_parquet(tmp_path / "parquet" / "data" / "train-0.parquet")
        plain = lines(tmp_path / "rows.jsonl", *ROWS)
        wanted = text_batches(tokenizer, plain, max_tokens=40, seed=3)
        for name in ("saved", "splits", "rows.parquet", "parquet"):
            assert list(read_texts(tmp_path / name)) == [row["text"] for row in ROWS], name
            found = text_batches(tokenizer, tmp_path / name, max_tokens=40, seed=3)
            for one, other in zip(found, wanted, strict=True):
                assert all(torch.equal(one[key], other[key]) for key in other), name

    def test_rows_are_read_as_they_are_drawn(self, datasets, tokenizer, tmp_path, monkeypatch):
        from lora_null.calibration.sources import Rows

        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
        read, original = [], Rows.__getitem__
        monkeypatch.setattr(Rows, "__getitem__", lambda self, index: read.append(index) or original(self, index))
        text_batches(tokenizer, tmp_path / "saved", max_tokens=10)
        assert len(read) == 1 + 5

    def test_conversations_in_rows(self, datasets, chatting, tmp_path):
        datasets.Dataset.from_list([{"messages": CHAT}]).save_to_disk(str(tmp_path / "saved"))
        (batch,) = text_batches(chatting, tmp_path / "saved", roles=["assistant"])
        wanted = text_batches(chatting, lines(tmp_path / "a.jsonl", {"messages": CHAT}), roles=["assistant"])
        assert torch.equal(batch["labels"], wanted[0]["labels"])

    def test_what_cannot_be_read_is_refused(self, datasets, tokenizer, tmp_path, monkeypatch):
        rows = datasets.Dataset.from_list([{"title": "w1"}])
        rows.save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(ValueError, match=r"saved, row 0 has \['title'\]; expected an object with a text field"):
            text_batches(tokenizer, tmp_path / "saved")
        datasets.DatasetDict({"one": rows, "two": rows}).save_to_disk(str(tmp_path / "splits"))
        with pytest.raises(ValueError, match="has the splits one, two; expected one that is called train"):
            read_texts(tmp_path / "splits")
        (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(ValueError, match=r"bad.parquet cannot be read"):
            read_texts(tmp_path / "bad.parquet")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"nobody/nothing cannot be read .*expected a text file"):
            read_texts("nobody/nothing")

    @pytest.mark.parametrize(("name", "said"), [("rows.parquet", ""), ("owner/name", "no such file, and ")])
    def test_without_the_library_one_sentence_says_so(self, tmp_path, monkeypatch, name, said):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "datasets", None)
        (tmp_path / "rows.parquet").touch()
        with pytest.raises(ImportError, match=rf"^{name}: {said}a data set is read by the library datasets, which is"):
            read_texts(name)

    def test_other_paths_are_not_taken_for_a_name_on_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "datasets", None)
        (tmp_path / "data").mkdir()
        for name in ("data/nothing", "other/text.jsonl", "nothing", "a/b/c", "../nothing", "/nothing"):
            with pytest.raises(FileNotFoundError, match="no such file"):
                read_texts(name)
