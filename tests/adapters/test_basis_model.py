"""Null-Basis LoRA in a whole model: what is free, what learns, what is kept, and every way out and back."""

import copy
import json

import pytest
import torch
from adapter_tools import R, ids, optimise
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_null
from lora_null import LoraNullConfig, null_basis
from lora_null.adapters import export_adapter
from lora_null.adapters.basis import BasisFactor, FreeDirections
from lora_null.adapters.layer import adapter_layers

ENERGIES = [0.9, 0.99]


@pytest.fixture
def found(llama, token_batches):
    # Few different tokens leave room, and a tenth of the energy more directions than half.
    return lora_null.calibrate(llama(), token_batches(vocab_size=8), progress=False)


@pytest.fixture
def task(llama, token_batches):
    return lora_null.calibrate(llama(), token_batches(seed=7), progress=False)


def config(energy=0.99, **options):
    return LoraNullConfig(**{"r": R, "lora_alpha": 9, "train": "b_in_basis", "energy": energy, **options})


def started(llama, found, *, task=None, **options):
    return lora_null.initialize(llama(), found, config(**options), task=task, progress=False)


def learn(model, steps=3, lr=1e-2, first=0):
    return optimise(model, map(ids, range(first, first + steps)), lr)


def leaks(model, found, energy):
    """Part of each layer's A, and of its update, in the protected directions."""
    for name, layer in adapter_layers(model).items():
        free = null_basis(found[name], energy)
        A, B = (factor.weight.detach() for factor in (layer.lora_A, layer.lora_B))
        yield max(free.leak(A), free.leak(B.double() @ A.double()))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits


@pytest.mark.parametrize("energy", ENERGIES)
def test_starts_as_the_model_and_learns_within_its_directions(llama, found, energy):
    model = started(llama, found, energy=energy)
    assert torch.equal(logits(model), logits(llama()))
    frozen = lora_null.initialize(llama(), found, LoraNullConfig(r=R, train="b"), progress=False)
    for (name, layer), plain in zip(adapter_layers(model).items(), adapter_layers(frozen).values(), strict=True):
        assert torch.equal(layer.weight, plain.weight)
        want = plain.lora_A.weight
        assert float((layer.lora_A.weight.detach() - want).norm() / want.norm()) < 1e-3, name
        k = model.lora_null_state.free[found.group_of(name)]
        assert k == null_basis(found[name], energy).k == layer.lora_A.directions.k
    kinds = {layer.lora_A.directions.complementary for layer in adapter_layers(model).values()}
    assert True in kinds and (energy == 0.9 or False in kinds)
    assert {n.rpartition(".")[0].rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    before = {name: layer.lora_A.weight.detach().clone() for name, layer in adapter_layers(model).items()}
    learn(model, 20)
    for name, layer in adapter_layers(model).items():
        assert float((layer.lora_A.weight.detach() - before[name]).norm() / before[name].norm()) > 0.05
    assert 1e-9 < max(leaks(model, found, energy)) < 1e-6


def test_a_group_shares_its_directions(llama, found):
    first = adapter_layers(started(llama, found))
    layers = {name.removeprefix("model.layers.0."): layer for name, layer in first.items() if ".0." in name}
    held = {name: id(layer.lora_A.directions) for name, layer in layers.items()}
    assert held["self_attn.q_proj"] == held["self_attn.k_proj"] == held["self_attn.v_proj"]
    assert held["mlp.gate_proj"] == held["mlp.up_proj"] and len(set(held.values())) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_leak_by_the_dtype_of_the_basis(llama, found, dtype):
    model = learn(started(llama, found, basis_dtype=dtype), 5)
    assert {layer.lora_A.directions.held.dtype for layer in adapter_layers(model).values()} == {getattr(torch, dtype)}
    low, high = (1e-9, 1e-6) if dtype == "float32" else (1e-4, 2**-7)
    assert low < max(leaks(model, found, 0.99)) < high


def test_containment_in_fp64(llama, found):
    options = config(basis_dtype="float64")
    model = lora_null.initialize(llama(torch.float64), found, options, adapter_dtype=torch.float64, progress=False)
    assert {layer.lora_A.directions.complementary for layer in adapter_layers(model).values()} == {True, False}
    learn(model, 100)
    assert max(leaks(model, found, 0.99)) < 1e-12


@pytest.mark.parametrize("train", ["b", "b_in_basis"])
def test_a_task_chooses_among_the_free_directions(llama, found, task, train):
    plain, aware = (
        lora_null.initialize(llama(), found, config(0.9, train=train), task=text, progress=False)
        for text in (None, task)
    )

    def used(model, covariances):
        shares = []
        for name, layer in adapter_layers(model).items():
            Q = torch.linalg.qr(layer.lora_A.weight.detach().double().mT)[0]
            C = covariances[name].double()
            shares.append(float((Q * (C @ Q)).sum() / C.trace()))
        return torch.tensor(shares)

    assert (used(aware, task) > 2 * used(plain, task)).all()
    assert max(leaks(aware, found, 0.9)) < 1e-6
    assert aware.lora_null_state.free == plain.lora_null_state.free


def test_a_task_without_an_energy_weighs_both(llama, found, task):
    aware = lora_null.initialize(llama(), found, LoraNullConfig(r=R, train="b"), task=task, progress=False)
    for name, layer in adapter_layers(aware).items():
        U = lora_null.null_space(found[name], R, task=task[name]).basis
        A = layer.lora_A.weight.detach().double()
        torch.testing.assert_close((A @ U) @ U.mT, A, rtol=0, atol=1e-5 * float(A.norm()))


def test_saved_adapters_are_plain_ones_and_say_what_they_are(llama, found, tmp_path):
    from peft import PeftModel

    model = learn(started(llama, found))
    want = logits(model)
    lora_null.save_adapter(model, tmp_path / "adapter")
    peft_model = PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(peft_model), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(lora_null.load_adapter(llama(), tmp_path / "adapter")), want, rtol=0, atol=1e-5)
    kept = json.loads((tmp_path / "adapter" / "lora_null.json").read_text())
    assert (kept["config"]["train"], kept["config"]["energy"], kept["stacked"]) == ("b_in_basis", 0.99, False)
    assert kept["free"] == {key: null_basis(found[key], 0.99).k for key in found}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == R


def test_merged_it_is_the_trained_model(llama, found):
    model = learn(started(llama, found))
    want = logits(model)
    torch.testing.assert_close(logits(lora_null.merge(model)), want, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, BasisFactor) for module in model.modules())


def test_training_goes_on_from_an_adapter(llama, found, tmp_path):
    model = learn(started(llama, found))
    lora_null.save_adapter(model, tmp_path / "adapter")
    loaded = lora_null.load_adapter(llama(), tmp_path / "adapter", is_trainable=True, covariances=found)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert loaded.lora_null_state.config == model.lora_null_state.config
    assert loaded.lora_null_state.free == model.lora_null_state.free
    for part in (model, loaded):
        learn(part.train(), 3, first=3)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)
    assert max(leaks(loaded, found, 0.99)) < 1e-6


def test_going_on_needs_the_covariances_of_the_run(llama, found, task, tmp_path):
    lora_null.save_adapter(learn(started(llama, found, energy=0.9)), tmp_path / "adapter")
    fresh = llama()
    with pytest.raises(ValueError, match=r"train='b_in_basis'.*Pass covariances="):
        lora_null.load_adapter(fresh, tmp_path / "adapter", is_trainable=True)
    with pytest.raises(ValueError, match=r"q_proj: The factor lies outside the \d+ free directions.*other covariances"):
        lora_null.load_adapter(fresh, tmp_path / "adapter", is_trainable=True, covariances=task)
    assert not adapter_layers(fresh) and all(p.requires_grad for p in fresh.parameters())


def test_state_dicts_are_exact_and_know_turned_directions(llama, found):
    model = learn(started(llama, found))
    state = copy.deepcopy(model.state_dict())
    again = started(llama, found)
    again.load_state_dict(state)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    # On another machine the eigenvectors come with other signs, or turned within a cluster.
    turned = started(llama, found)
    for layer in adapter_layers(turned).values():
        held = layer.lora_A.directions.held
        held.neg_()
        held[:, :2] = held[:, :2] @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
        layer.lora_A._made = None
    turned.load_state_dict(state)
    torch.testing.assert_close(logits(turned), logits(model), rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="outside the"):
        other = lora_null.initialize(llama(), found, config(0.5), progress=False)
        started_from = {key: torch.roll(value, 1, -1) if "lora_A" in key else value for key, value in state.items()}
        other.load_state_dict({key: value for key, value in started_from.items() if "coefficients" not in key})


def test_a_trainers_checkpoint_exports_and_resumes(llama, found, tmp_path):
    model = learn(started(llama, found))
    want = logits(model)
    model.save_pretrained(tmp_path / "checkpoint")
    assert export_adapter(tmp_path / "checkpoint", tmp_path / "exported") == R
    torch.testing.assert_close(logits(lora_null.load_adapter(llama(), tmp_path / "exported")), want, rtol=0, atol=1e-5)


def test_too_much_energy_is_refused_and_smaller_ranks_are_taken_where_asked(llama, found):
    model, k = llama(), {name: null_basis(found[name], 0.9).k for names in found.groups.values() for name in names}
    few = {name: free for name, free in k.items() if free < 42}
    for train in ("b", "b_in_basis"):
        with pytest.raises(ValueError, match="leaves fewer directions free than the rank") as refusal:
            lora_null.initialize(model, found, config(0.9, r=42, train=train), progress=False)
        assert f"in {len(few)} of 14 layers: model.layers.0.self_attn.q_proj (r=42) 41, " in str(refusal.value)
        assert not adapter_layers(model)
    # What the message proposes.
    enough = float(str(refusal.value).partition("Lower it to energy=")[2].partition(", lower r")[0])
    assert min(started(llama, found, r=42, energy=enough).lora_null_state.free.values()) >= 42
    model = started(llama, found, r=42, energy=0.9, rank_pattern=few)
    assert {name: layer.r for name, layer in adapter_layers(model).items()} == {n: min(42, k[n]) for n in k}


@pytest.mark.parametrize("r", [R, 42])
def test_by_default_the_least_used_are_free_where_the_energy_leaves_fewer(llama, found, task, r, caplog):
    """The start is that of A frozen, whether its directions came with the free ones or from a solver of their own."""
    plain = LoraNullConfig(r=r)
    with caplog.at_level("INFO", "lora_null"):
        model = lora_null.initialize(llama(), found, plain, progress=False)
    assert "energy=0.99 leaves" in caplog.text
    k = {key: max(r, null_basis(C, 0.99).k) for key, C in found.items()}
    assert model.lora_null_state.free == k and (r == R or r in k.values())
    frozen = lora_null.initialize(llama(), found, LoraNullConfig(r=r, train="b"), progress=False)
    for layer, other in zip(adapter_layers(model).values(), adapter_layers(frozen).values(), strict=True):
        A, want = layer.lora_A.weight.detach(), other.lora_A.weight
        assert float((A - want).norm()) < 1e-3 * float(want.norm())
    learn(model)
    for name, layer in adapter_layers(model).items():
        free = null_basis(found[name], 0.99, at_least=r)
        assert free.leak(layer.lora_A.weight.detach()) < 1e-5, name
    aware = lora_null.initialize(llama(), found, plain, task=task, progress=False)
    assert aware.lora_null_state.free == k


def test_tasks_of_other_models_or_without_room_are_refused(llama, found, token_batches):
    model = llama()
    wide = lora_null.calibrate(llama(hidden_size=64), token_batches(), progress=False)
    part = lora_null.calibrate(llama(), token_batches(), LoraNullConfig(target_modules=["q_proj"]), progress=False)
    blind = {}
    for key, C in found.items():
        values, vectors = torch.linalg.eigh(C.double())
        P = vectors[:, null_basis(C, 0.9).k :]
        blind[key] = P @ torch.diag(values[-P.shape[1] :]) @ P.mT
    nothing = lora_null.Covariances(blind, found.groups, found.tokens)
    for other, message in (
        (wide, r"covariance of model\.layers\.0\.self_attn\.q_proj has 64 features, but the layer reads 48"),
        (part, r"The task covariances hold no entry for 12 of 14 target layers"),
        (nothing, r"q_proj: null_space: task sees nothing in the \d+ free directions"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_null.initialize(model, found, config(0.9), task=other, progress=False)
    assert not adapter_layers(model) and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    own = lora_null.calibrate(model, [ids(5)], progress=False)
    with pytest.raises(ValueError, match="The task covariances were collected on other weights"):
        lora_null.initialize(model, own, config(0.5), task=found, progress=False)


def test_quantised_bases_keep_their_product(llama, found):
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model, plain = llama(), llama()
    for module in (model, plain):
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Special
    lora_null.initialize(model, found, config(target_modules=["down_proj"]), progress=False)
    learn(model)
    assert max(leaks(model, found, 0.99)) < 1e-6


def test_tasks_in_a_row_leave_each_other_alone(llama, found, token_batches):
    """The second task's adapter reads nothing of the first one's text, and both together are the sum."""
    model, pretrained = llama(), llama()
    kept, shift = found, []
    for seed in (11, 12):
        before = copy.deepcopy(model)
        lora_null.initialize(model, kept, config(0.9), progress=False)
        assert max(leaks(learn(model, 5, first=seed), kept, 0.9)) < 1e-6
        lora_null.merge(model)
        shift.append({n: p.detach() - dict(before.named_parameters())[n] for n, p in model.named_parameters()})
        # Of the weights as they are now, so that nothing warns.
        text = [batch + 8 * (seed - 10) for batch in token_batches(vocab_size=8, seed=seed)]
        kept = kept + lora_null.calibrate(model, text, progress=False)
    for name, weight in model.named_parameters():
        want = dict(pretrained.named_parameters())[name] + shift[0][name] + shift[1][name]
        torch.testing.assert_close(weight, want, rtol=0, atol=1e-6)
    room = [sum(null_basis(C, 0.9).k for _, C in text.items()) for text in (found, kept)]
    assert room[1] < room[0]


def test_sums_are_of_the_merged_model(llama, found):
    merged = lora_null.merge(learn(started(llama, found)))
    text = lora_null.calibrate(merged, [ids(5)], progress=False)
    lora_null.initialize(copy.deepcopy(merged), found + text, config(0.5), progress=False)
    with pytest.raises(ValueError, match="other weights"):
        lora_null.initialize(copy.deepcopy(merged), found, config(0.5), progress=False)
    lora_null.initialize(copy.deepcopy(merged), found, config(0.5), verify_base=False, progress=False)
    # Those of a quantised model have no print, and so their sums are of any.
    text.metadata["base_fingerprint"] = ""
    lora_null.initialize(llama(seed=7), found + text, config(0.5), progress=False)


@given(
    d=st.integers(2, 24),
    tokens=st.integers(1, 40),
    r=st.integers(1, 6),
    m=st.integers(1, 12),
    energy=st.floats(0, 0.999),
    decay=st.floats(0, 3),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_whatever_is_learned(d, tokens, r, m, energy, decay, seed):
    """|dW X|_F <= |B C|_2 (sum of the free eigenvalues)^(1/2), and nothing on what is protected."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    X = scale[:, None] * torch.randn(d, tokens, generator=generator, dtype=torch.float64)
    try:
        free = null_basis(X @ X.mT, energy)
    except ValueError:
        assume(False)
    factor = BasisFactor(torch.zeros(r, d, dtype=torch.float64), FreeDirections(free, dtype=torch.float64))
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        factor.coefficients.copy_(torch.randn(factor.coefficients.shape, generator=generator, dtype=torch.float64))
        update = B @ factor.weight
        # C N^T has the singular values of C, however it is held.
        limit = float(torch.linalg.matrix_norm(update, 2)) * max(free.energy_left, 0.0) ** 0.5
        rounding = 1e-12 * float(update.norm() * X.norm())
        assert float((update @ X).norm()) <= limit + rounding
        P = torch.linalg.eigh(X @ X.mT)[1][:, free.k :]
        assert float((update @ P).norm()) <= 1e-7 * float(update.norm())


def test_a_trainer_resumes_to_the_same_bits(llama, found, tmp_path):
    from transformers import Trainer, TrainingArguments

    def run(folder, resume=None):
        options = TrainingArguments(
            str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in torch.cat([ids(seed) for seed in range(4)])]
        trainer = Trainer(started(llama, found), options, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    straight = run(tmp_path / "run")
    resumed = run(tmp_path / "again", str(tmp_path / "run" / "checkpoint-2"))
    for mine, theirs in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    export_adapter(tmp_path / "run" / "checkpoint-4", tmp_path / "exported")
    loaded = lora_null.load_adapter(llama(), tmp_path / "exported")
    torch.testing.assert_close(logits(loaded), logits(straight), rtol=0, atol=1e-5)


def test_compiled_and_checkpointed_it_learns_the_same(llama, found):
    torch._dynamo.reset()
    want = learn(started(llama, found))
    compiled = started(llama, found)
    learn(torch.compile(compiled, backend="aot_eager"))
    checkpointed = started(llama, found).train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    learn(checkpointed)
    for model in (compiled, checkpointed):
        torch.testing.assert_close(logits(model), logits(want), rtol=0, atol=1e-4)
