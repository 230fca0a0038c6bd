"""What the commands read: texts, token batches, names of targets and dtypes."""

import json
import os

import pytest
import torch

from lora_null.calibration.sources import read_texts
from lora_null.calibration.texts import token_batches
from lora_null.cli.options import parse_targets
from lora_null.models.loading import parse_dtype


def test_text_file_is_read_by_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\r\n\r\nthree\n\n\n\nfour\n")
    assert read_texts(tmp_path / "a.txt") == ["one\ntwo", "three", "four"]


def test_lines_that_only_look_blank_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n \t\ntwo", encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one", "two"]


def test_json_strings_may_hold_other_line_separators(tmp_path):
    texts = ["a\u2028b", "c\x85d\x0ce"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    assert read_texts(tmp_path / "a.jsonl") == texts


def test_jsonl_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"question": "b", "answer": "c"}\n"d"\n')
    assert read_texts(path) == ["a", "b\nc", "d"]
    path.write_text('{"text": "a", "body": "b"}\n')
    assert read_texts(path, field="body") == ["b"]


@pytest.mark.parametrize(
    ("content", "match"),
    [('{"text": 1}', "line 1 has"), ("[1]", "a list"), ("{", "line 1 is not JSON"), ("", "holds no text")],
)
def test_bad_jsonl(tmp_path, content, match):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=match):
        read_texts(tmp_path / "a.jsonl")


def test_binary_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_texts(tmp_path / "a.txt")


def test_batches_keep_every_token_and_cut_long_documents(tokenizer):
    texts = ["w1 w2 w3 w4 w5", "w6", "w7 w8"]
    batches = token_batches(tokenizer, texts, sequence_length=3, batch_size=2)
    kept = [ids[mask.bool()].tolist() for b in batches for ids, mask in zip(*b.values(), strict=True)]
    assert sorted(kept) == [[2, 3, 4], [5, 6], [7], [8, 9]]


def test_max_tokens_draws_whole_documents_in_a_seeded_order(tokenizer):
    texts = [f"w{i} w{i}" for i in range(50)]

    def drawn(seed):
        batches = token_batches(tokenizer, texts, max_tokens=20, seed=seed)
        return sorted(int(row[0]) for batch in batches for row in batch["input_ids"])

    assert len(drawn(0)) == 10 and drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize("max_tokens", [1, 7, 20, 399])
def test_max_tokens_holds_for_one_long_text_too(tokenizer, max_tokens):
    for texts in (["w1 w2 " * 200], ["w1 w2 w3 w4 w5"] * 80):
        batches = token_batches(tokenizer, texts, max_tokens=max_tokens, sequence_length=16)
        assert sum(int(batch["attention_mask"].sum()) for batch in batches) == max_tokens


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_regular_file_of_bounded_size_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with open(tmp_path / "vast", "wb") as file:
        file.truncate(2**40)
    for name, match in (("pipe", "is a pipe"), ("zero", "a device"), ("vast", "at most 1,073,741,824 bytes")):
        with pytest.raises(ValueError, match=rf"{name}.*{match}"):
            read_texts(tmp_path / name)
    with pytest.raises(IsADirectoryError, match="expected a text file"):
        read_texts(tmp_path)


def test_targets_and_dtypes():
    assert parse_targets("all-linear") == "all-linear"
    assert parse_targets("q_proj, v_proj") == ("q_proj", "v_proj")
    assert parse_targets(r".*\.q_proj") == r".*\.q_proj"
    assert parse_dtype("bf16") == parse_dtype("bfloat16") == torch.bfloat16 and parse_dtype("auto") is None
    with pytest.raises(ValueError, match="bfloat16"):
        parse_dtype("bool")
