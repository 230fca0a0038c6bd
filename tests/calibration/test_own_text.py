"""Text that the model writes itself: drawn from its own distribution, the same for the same seed."""

from types import SimpleNamespace

import pytest
import torch

import lora_null
from lora_null import own_text
from lora_null.models.parts import cache_name

BOS = 5


def tokenizer(bos=BOS, eos=None):
    encode = lambda text: {"input_ids": [ord(letter) % 97 for letter in text]}  # noqa: E731
    made = SimpleNamespace(bos_token_id=bos, eos_token_id=eos)
    return type("Tokenizer", (), {"__call__": lambda self, text: encode(text), **vars(made)})()


def write(model, tokens, *, by=None, **options):
    return own_text(model, by or tokenizer(), tokens, progress=False, **options)


def test_tokens_are_drawn_from_the_models_distribution(llama):
    """The second token's frequencies against its probabilities: chi-square over the likeliest tokens and the rest."""
    model = llama().double()
    count = 6000
    ids = torch.cat([batch["input_ids"] for batch in write(model, 2 * count, sequence_length=2, batch_size=1500)])
    assert ids.shape == (count, 2) and (ids[:, 0] == BOS).all()
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([[BOS]])).logits[0, -1].softmax(-1)
    expected = count * chances
    seen = torch.bincount(ids[:, 1], minlength=len(chances)).double()
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    # 97 tokens: mean 96, standard deviation 14.
    assert chi_square < 96 + 5 * 14
    uniform = torch.full_like(expected, count / len(expected))
    assert float(((seen - uniform) ** 2 / uniform).sum()) > 96 + 5 * 14  # the test would see another distribution


def test_the_cache_changes_nothing(llama):
    """Each later token is drawn as without a cache: the same numbers from the same generator."""
    model = llama().double()
    (batch,) = write(model, 3 * 12, sequence_length=12, batch_size=8, seed=3)
    generator = torch.Generator().manual_seed(3)
    ids = torch.full((3, 1), BOS)
    while ids.shape[1] < 12:
        with torch.no_grad():
            chances = model(input_ids=ids).logits[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    assert torch.equal(batch["input_ids"], ids)


def test_prompts_are_gone_on_with(llama):
    batches = write(llama(), 5 * 8, prompts=("ab", "xyz", "cd"), sequence_length=8, batch_size=2)
    rows = sorted(tuple(row) for batch in batches for row in batch["input_ids"].tolist())
    ab, cd, xyz = ([ord(letter) % 97 for letter in text] for text in ("ab", "cd", "xyz"))
    assert sorted(row[:2] for row in map(list, rows)) == sorted([ab, ab, cd, xyz[:2], xyz[:2]])
    assert all(len(row) == 8 for row in rows)


def test_it_calibrates_and_leaves_everything_as_it_was(llama):
    model = llama().train()
    state = torch.get_rng_state()
    batches = write(model, 200, sequence_length=16, batch_size=4)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert sum(batch["input_ids"].numel() for batch in batches) == 208
    covariances = lora_null.calibrate(model, batches, progress=False)
    assert set(covariances.tokens.values()) == {208}


def test_a_cache_may_have_the_name_of_newer_models(llama):
    class Newer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids, cache=None, use_cache=False):
            seen.append(input_ids.shape[1])
            name = cache_name(self.inner)
            outputs = self.inner(input_ids=input_ids, use_cache=use_cache, **{name: cache})
            return SimpleNamespace(logits=outputs.logits, cache=getattr(outputs, name))

    seen = []
    (made,), (wanted,) = (write(model, 16, sequence_length=8) for model in (Newer(), llama()))
    assert torch.equal(made["input_ids"], wanted["input_ids"]) and seen == [1] * 7
    assert cache_name(Newer()) == "cache"


def test_what_cannot_write_is_refused(llama):
    with pytest.raises(ValueError, match="neither a bos_token nor an eos_token"):
        write(llama(), 8, by=tokenizer(bos=None))
    with pytest.raises(ValueError, match="has 9 tokens; expected at least one, and fewer than sequence_length=8"):
        write(llama(), 8, prompts=("too  long",), sequence_length=8)
    with pytest.raises(ValueError, match="tokens is 0"):
        write(llama(), 0)
    with pytest.raises(TypeError, match="own_text: model is"):
        write("name", 8)
    model = llama()
    forget = lambda self, args, output: SimpleNamespace(logits=output.logits)  # noqa: E731
    model.register_forward_hook(forget)
    with pytest.raises(ValueError, match=r"returned no (past_key_values|cache), or has an encoder"):
        write(model, 8, sequence_length=4)
