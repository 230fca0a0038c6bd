"""The forms that calibration data may take, and what is said of data and options that are wrong."""

import pytest
import torch
from calibration_tools import VOCABULARY, assert_as_good_as_torch, assert_equal, llama, token_ids, truth
from torch import nn
from torch.utils.data import DataLoader

from lora_null import LoraNullConfig, calibrate, memory_plan
from lora_null.calibration.batches import BatchReader

# Tiny products are faster on one thread, and the bits of a sum depend on the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_form_of_batches_gives_the_same_bits():
    model, ids = llama(), token_ids(6, 30)
    rows = [ids[i : i + 2] for i in range(0, 6, 2)]
    wanted = calibrate(model, rows)

    def run_model():
        for batch in rows:
            model(input_ids=batch)

    def run_base_model():
        for batch in rows:
            model.model(batch)

    class Texts(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return {"input_ids": ids[i], "attention_mask": torch.ones(30, dtype=torch.long)}

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    def run_under_inference_mode():
        with torch.inference_mode():
            run_model()

    forms = {
        "iterator": iter(rows),
        "DataLoader without length": DataLoader(Stream(), batch_size=None),
        "mapping": [{"input_ids": batch} for batch in rows],
        "extra columns": [{"input_ids": batch, "text": ["a", "b"], "length": [30, 30]} for batch in rows],
        "lists of numbers": [{"input_ids": batch.tolist()} for batch in rows],
        "tuples": [(batch, torch.ones_like(batch)) for batch in rows],
        "DataLoader": DataLoader(Texts(), batch_size=2),
        "callback": run_model,
        "callback of the base model": run_base_model,
        "callback under inference mode": run_under_inference_mode,
    }
    for form, batches in forms.items():
        got = calibrate(model, batches)
        assert got.groups == wanted.groups and got.tokens == wanted.tokens, form
        for key, matrix in wanted.items():
            assert torch.equal(got[key], matrix), f"{form}: {key}"


def test_one_tensor_is_cut_into_rows_and_rows_may_be_bare():
    model, ids = llama(), token_ids(6, 30)
    wanted, plain = truth(model, [{"input_ids": ids}])
    for batches in (ids, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, list(ids)):
        assert_as_good_as_torch(calibrate(model, batches, queue_tokens=64), wanted, plain)


@pytest.mark.parametrize("low_memory", [False, True], ids=["streaming", "layerwise"])
@pytest.mark.parametrize("where", [0, 1, 3])
@pytest.mark.parametrize(
    "empty",
    [
        torch.zeros(1, 0, dtype=torch.long),
        {"input_ids": [[]], "attention_mask": [[]]},
        {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3)},
    ],
    ids=["no ids", "the tokenizer's answer to no text", "padding only"],
)
def test_a_text_without_tokens_is_passed_over_wherever_it_stands(tmp_path, empty, where, low_memory):
    model, texts = llama(), [token_ids(2, 30, seed) for seed in range(3)]
    wanted = calibrate(model, texts)
    texts[where:where] = [empty, empty]
    for _ in range(2):
        got = calibrate(model, texts, low_memory=low_memory, checkpoint=tmp_path / "run")
        assert_equal(got, wanted)
    with pytest.raises(ValueError, match="No token was counted"):
        calibrate(model, [empty, empty], low_memory=low_memory)


def test_a_plan_needs_a_token():
    with pytest.raises(ValueError, match="No token counts in the batches to plan for"):
        memory_plan(llama(), torch.zeros(1, 0, dtype=torch.long))


def test_bad_input_gets_a_clear_error():
    model, ids = llama(), token_ids(2, 40)
    with pytest.raises(ValueError, match="No token was counted"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="No token was counted"):
        calibrate(model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])
    with pytest.raises(ValueError, match="no linear layer"):
        calibrate(nn.Sequential(nn.LayerNorm(4)), [torch.ones(2, 4)])
    with pytest.raises(ValueError, match="match no linear layer"):
        calibrate(model, [ids], LoraNullConfig(target_modules=["query"]))
    with pytest.raises(TypeError, match="tokenized first"):
        calibrate(model, ["Paris is the capital of France."])
    with pytest.raises(TypeError, match=r"Batch 0 holds no tensor"):
        calibrate(model, {"text": ["Paris is the capital of France."]})
    with pytest.raises(TypeError, match="batches is a str"):
        calibrate(model, "Paris is the capital of France.")
    with pytest.raises(ValueError, match=r"attention_mask of batch 0 is \(2, 1, 40, 40\)"):
        calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones(2, 1, 40, 40)}])
    for option, value in [
        ("mask", "padding"),
        ("accumulate", "bf16"),
        ("offload", "disk"),
        ("queue_tokens", 0),
        ("checkpoint_every", 0),
    ]:
        with pytest.raises(ValueError, match=f"{option} is {value!r}"):
            calibrate(model, [ids], **{option: value})


@pytest.mark.parametrize("low_memory", [False, True], ids=["streaming", "layerwise"])
@pytest.mark.parametrize("wrong", [[VOCABULARY, 500], [-100]], ids=str)
def test_ids_out_of_the_vocabulary_are_named(wrong, low_memory):
    model, good, bad = llama(), token_ids(2, 40), token_ids(2, 40)
    bad[1, : len(wrong)] = torch.tensor(wrong)
    expected = rf"Batch 2 has the token ids {str(wrong)[1:-1]}; expected 0 to {VOCABULARY - 1}.*resize_token_embeddings"
    with pytest.raises(ValueError, match=expected):
        calibrate(model, [good, good, bad], low_memory=low_memory)
    with pytest.raises(ValueError, match=expected.replace("Batch 2", "Batch 0")):
        calibrate(model, lambda: model(bad))


def test_placeholders_that_the_model_replaces_are_no_mistake():
    reader = BatchReader(llama(), "attention")
    reader.placeholders = {500}
    ids = token_ids(1, 5)
    ids[0, 2] = 500
    assert reader.read(ids, 0).tokens == 5
    model = llama()
    model.config.image_token_id = 500
    assert BatchReader(model, "attention").placeholders == {500}


def test_a_list_of_numbers_is_not_a_list_of_batches():
    model = llama()
    with pytest.raises(TypeError, match=r"Batch 0 is the single number 7; .* pass \[ids\]"):
        calibrate(model, [7, 8, 9])
    with pytest.raises(TypeError, match=r"Batch 1 is the single number 8"):
        calibrate(model, [token_ids(2, 40), {"input_ids": 8}])
    assert set(calibrate(model, [[7, 8, 9]]).tokens.values()) == {3}


def test_a_folder_or_a_foreign_file_is_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("mine")
    for low_memory in (False, True):
        with pytest.raises(IsADirectoryError, match=r"which is a folder; expected the name of a file"):
            calibrate(llama(), [token_ids(2, 40)], checkpoint=tmp_path, low_memory=low_memory)
        with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
            calibrate(llama(), [token_ids(2, 40)], checkpoint=tmp_path / "file", low_memory=low_memory)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_layers_whose_rows_are_not_tokens_refuse_padding():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.embedding(input_ids).mean(1))

    ids = token_ids(40, 7)
    assert calibrate(Pooled(), [ids]).tokens == {"head": 40}
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    with pytest.raises(ValueError, match=r'batch 0|Batch 0 has padding.*mask="none"'):
        calibrate(Pooled(), [{"input_ids": ids, "attention_mask": mask}])
