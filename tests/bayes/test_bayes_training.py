"""Random factors in training: layers run on samples, everything else sees the mean, and the end is plain LoRA."""

import copy
from functools import partial

import pytest
import torch
from bayes_tools import KINDS, adapted, labelled_batches, with_peft
from safetensors.torch import load_file

import lora_null
import lora_null.peft
from lora_null.adapters.export import export_adapter
from lora_null.adapters.layer import attach_adapter
from lora_null.bayes import Posterior, added_loss, blob, collect, inducing, tfb, trainer_loss
from lora_null.bayes.layers import adapted_layers

METHODS = {"inducing": inducing, "blob": blob}
EVERY = [(kind, method) for kind in KINDS for method in METHODS]


def ready(model):
    """Return an adapter in the state that training begins in: what is trained requires gradients."""
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            assert parameter.grad is None
    return model.train()


def learn(model, steps=3, rate=0.05):
    torch.manual_seed(1)
    batch = labelled_batches()[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        loss = model(**batch).loss + added_loss(model, kl=1e-6)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def save(model, path):
    whole = model.peft_config if hasattr(model, "peft_config") else None
    (lora_null.save_adapter if whole is None else lora_null.peft.save_adapter)(model, path)
    return load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize(("kind", "method"), EVERY)
def test_layers_run_on_samples_while_they_train_and_on_the_mean_otherwise(kind, method, llama, token_batches):
    model, ids = ready(adapted(kind, llama, token_batches)), labelled_batches()[0]["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
    made = METHODS[method](model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(p.requires_grad and "lora_" in names[id(p)] for p in made)
    torch.manual_seed(0)
    first, second = model(ids).logits, model(ids).logits
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, first)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    model(**labelled_batches()[0]).loss.backward()
    still = {names[id(p)] for p in made if p.grad is None or not p.grad.abs().max() > 0}
    assert all(name.endswith("flow.first") for name in still)  # behind a zero, as A is behind B


@pytest.mark.parametrize(("kind", "method"), EVERY)
def test_a_trained_posterior_ends_as_plain_lora_with_its_mean(kind, method, llama, token_batches, tmp_path):
    model, batch = ready(adapted(kind, llama, token_batches)), labelled_batches()[0]
    state, hooks = {n: p.requires_grad for n, p in model.named_parameters()}, hooks_of(model)
    METHODS[method](model)
    learn(model)
    with pytest.raises(ValueError, match="collect"):
        tfb(model, [batch])
    during = save(model, tmp_path / "during")
    with torch.no_grad():
        mean = model.eval()(batch["input_ids"]).logits
    posterior = collect(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == state and hooks_of(model) == hooks
    with torch.no_grad():
        torch.testing.assert_close(model(batch["input_ids"]).logits, mean, atol=1e-6, rtol=1e-5)
    after = save(model, tmp_path / "after")
    assert during.keys() == after.keys()
    for key in after:
        torch.testing.assert_close(during[key], after[key])

    assert posterior.method == method and posterior.facts["kl"] > 0
    posterior.save(tmp_path / "p.safetensors")
    loaded = Posterior.load(tmp_path / "p.safetensors")
    for (key, one), (other, two) in zip(posterior.draw(3).items(), loaded.draw(3).items(), strict=True):
        assert key == other and torch.equal(one, two) and one.std() > 0
    found = loaded.predict(model, batch["input_ids"], samples=2)
    apart = torch.stack([posterior.predict(model, batch["input_ids"], samples=1, seed=s) for s in (0, 1)])
    torch.testing.assert_close(found, apart.mean(0), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="collected once"):
        collect(model)
    METHODS[method](model.train())  # and it may begin again


def hooks_of(model):
    return sum(
        len(getattr(module, f"_{which}_hooks"))
        for module in model.modules()
        for which in ("forward", "forward_pre", "state_dict", "load_state_dict_pre")
    )


@pytest.mark.parametrize("method", METHODS)
def test_fused_layers_of_peft_give_what_its_own_give(method, llama):
    model, ids = ready(with_peft(llama())), labelled_batches()[0]["input_ids"]
    METHODS[method](model)
    torch.manual_seed(0)
    want = model(ids).logits
    assert lora_null.peft.use_fused_kernels(model).patched == 6
    torch.manual_seed(0)
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpointed_block_is_recomputed_with_the_same_sample(method, llama, token_batches):
    gradients = []
    for checkpointed in (False, True):
        model = ready(adapted("shifted", llama, token_batches))
        torch.manual_seed(5)
        METHODS[method](model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        model(**labelled_batches()[0]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert all(getattr(module, "drawn", None) is None for module in model.modules())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_a_forward_that_fails_leaves_the_mean(llama, token_batches):
    model = ready(adapted("frozen", llama, token_batches))
    inducing(model)
    layer = next(iter(adapted_layers(model, random=True).values()))
    with pytest.raises(ValueError):
        layer.module(torch.zeros(2, 1))
    assert torch.equal(layer.factor("lora_B"), layer.factor("lora_B"))


def test_an_adapter_that_is_switched_off_has_no_noise(llama, token_batches):
    from lora_null.adapters.layer import disable_adapters

    ids = labelled_batches()[0]["input_ids"]
    for kind in ("frozen", "peft"):
        model = ready(adapted(kind, llama, token_batches))
        blob(model)
        with torch.no_grad(), disable_adapters(model) if kind == "frozen" else model.disable_adapter():
            assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["frozen", "peft"])
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_goes_on_and_is_exported_as_the_mean(kind, method, llama, token_batches, tmp_path):
    def fresh():
        model = ready(adapted(kind, llama, token_batches))
        METHODS[method](model)
        return model

    model = learn(fresh())
    other = fresh()
    other.load_state_dict(copy.deepcopy(model).state_dict())
    ids = labelled_batches()[0]["input_ids"]
    outputs = []
    for one in (model, other):
        torch.manual_seed(0)
        outputs.append(one(ids).logits)
    assert torch.equal(*outputs)
    if kind == "frozen":
        model.save_pretrained(tmp_path / "checkpoint")
        export_adapter(tmp_path / "checkpoint", tmp_path / "exported")
        collect(model)
        exported, wanted = load_file(tmp_path / "exported" / "adapter_model.safetensors"), save(model, tmp_path / "w")
        assert exported.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(exported[key], wanted[key])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*invalid shape")  # PEFT takes a vector for a part of a sharded matrix
def test_a_checkpoint_of_peft_goes_on_in_peft_and_is_the_mean_to_other_readers(method, llama, tmp_path):
    from peft import PeftModel

    def fresh():
        model = ready(with_peft(llama()))
        METHODS[method](model)
        return model

    model, other, ids = learn(fresh()), fresh(), labelled_batches()[0]["input_ids"]
    model.save_pretrained(tmp_path)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    outputs = []
    for one in (model, other.train()):
        torch.manual_seed(0)
        outputs.append(one(ids).logits)
    assert torch.equal(*outputs)
    with torch.no_grad():
        reader = PeftModel.from_pretrained(llama(), tmp_path)
        torch.testing.assert_close(reader(ids).logits, model.eval()(ids).logits)


def test_a_copy_of_a_model_is_collected_by_itself(llama, token_batches):
    model = ready(adapted("frozen", llama, token_batches))
    blob(model)
    twin = copy.deepcopy(model)
    collect(twin)
    ids = labelled_batches()[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, twin(ids).logits)
    assert len(adapted_layers(model, random=True)) and added_loss(model, kl=1.0) > 0
    collect(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_a_random_B_on_a_null_space_never_reaches_protected_inputs(method, training):
    """In training and after it: with A frozen where A x = 0, pre-trained answers keep their probabilities."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 9, dtype=torch.float64))
    protected = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 12, dtype=torch.float64)
    before = model(protected).detach().softmax(-1)
    basis = lora_null.null_space(protected.T @ protected, 3).basis
    attach_adapter(model[0], basis.T.contiguous().double(), torch.randn(9, 3, dtype=torch.float64))
    made = METHODS[method](model)  # A is frozen: B alone
    assert {factor for _, factor, _ in parts(model)} == {"lora_B"}
    with torch.no_grad():
        for parameter in made:
            parameter.add_(torch.randn_like(parameter))
    model.train()
    if training:
        found = torch.stack([model(protected).softmax(-1) for _ in range(8)])
        elsewhere = torch.randn(7, 12, dtype=torch.float64)
        assert not torch.allclose(model(elsewhere), model(elsewhere))
    else:
        found = collect(model).predict(model, {"input": protected}, samples=8)[None]
    torch.testing.assert_close(found, before.expand_as(found), atol=1e-12, rtol=0)


def parts(model):
    from lora_null.bayes.training import random_factors

    return list(random_factors(adapted_layers(model, random=True)))


def test_the_aids_are_torchs_smoothing_and_the_entropy(llama, token_batches):
    model, batch = ready(adapted("frozen", llama, token_batches, torch.float64)), labelled_batches()[0]
    blob(model)
    outputs = model(**batch)
    plain = partial(added_loss, model, outputs, batch["labels"], kl=0.0)
    logits, wanted = outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    smoothed = torch.nn.functional.cross_entropy(logits, wanted, label_smoothing=0.1)
    torch.testing.assert_close(outputs.loss + plain(label_smoothing=0.1), smoothed)
    p = logits[wanted != -100].softmax(-1)
    torch.testing.assert_close(plain(entropy=0.3), -0.3 * torch.distributions.Categorical(p).entropy().mean())
    assert plain() == 0
    assert added_loss(model, kl=2.0) == 2 * added_loss(model, kl=1.0)
    with pytest.raises(ValueError, match="outputs and labels"):
        added_loss(model, kl=1.0, entropy=0.1)


@pytest.mark.parametrize("kind", ["frozen", "peft"])
def test_a_trainer_adds_the_divergence_once_a_step(kind, llama, token_batches, tmp_path):
    from transformers import Trainer, TrainingArguments

    batch = labelled_batches(count=1, batch=4)[0]
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    found = []
    for accumulated in (1, 2):
        model = ready(adapted(kind, llama, token_batches))
        torch.manual_seed(0)
        blob(model)
        for _, _, part in parts(model):
            part.rho.data.fill_(1e-6)  # no noise: a step is the same however it is divided
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=4 // accumulated,
                gradient_accumulation_steps=accumulated,
                learning_rate=1e-2,
                optim="sgd",
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                logging_strategy="steps",
                logging_steps=1,
            ),
            train_dataset=rows,
            compute_loss_func=trainer_loss(model, kl=1e-3),
        )
        expected = float(model(**batch).loss + added_loss(model, kl=1e-3))
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)
        found.append({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-3)


def test_what_cannot_be_random_is_refused_and_nothing_changed(llama, token_batches):
    model = ready(adapted("frozen", llama, token_batches))
    for method in (inducing, blob):
        with pytest.raises(ValueError, match=r"lora_A of .* is frozen"):
            method(model, which="ab")
        with pytest.raises(ValueError, match='"ab"'):
            method(model, which="c")
        with pytest.raises(ValueError, match="positive"):
            method(model, prior_std=0.0)
        with pytest.raises(ValueError, match="no LoRA adapter"):
            method(torch.nn.Linear(2, 2))
    assert not parts(model)
    with pytest.raises(ValueError, match="no random factor"):
        added_loss(model, kl=1.0)
    with pytest.raises(ValueError, match="no random factor"):
        collect(model)
    inducing(model)
    with pytest.raises(ValueError, match="collect"):
        blob(model)


def test_a_factor_that_learns_within_free_directions_stays_there(llama, token_batches):
    model = llama()
    covariances = lora_null.calibrate(model, token_batches(vocab_size=8), progress=False)
    config = lora_null.LoraNullConfig(r=4, train="b_in_basis", energy=0.9)
    lora_null.initialize(model, covariances, config, progress=False)
    inducing(model)
    assert {factor for _, factor, _ in parts(model)} == {"lora_B"}
