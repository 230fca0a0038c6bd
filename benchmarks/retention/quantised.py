"""Fine-tuning a 4-bit model that is to stay one: ``python -m benchmarks.retention.quantised``, which needs HQQ.

QA-LoRA goes into the zero points and leaves the codes as they are; QLoRA is kept in 16 bits beside the 4-bit weights,
or its sum with them is quantised again, as PEFT merges it. What was merged is written and read back by HQQ before it
is judged, and everything is compared with the model before. That comes from a file of 4 bits in groups of 32 itself, so
that to quantise it costs nothing and what adapters do is all that is seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

import lora_null
from lora_null.bayes.layers import adapted_layers
from lora_null.evaluation.intervals import estimates
from lora_null.models.targets import target_linears
from lora_null.quickstart import model as models
from lora_null.system.environment import cache_folder

from .. import environment, predictions, records
from .methods import Start, smaller_ranks
from .study import BEFORE, Bench, Run, Sizes

RESULTS = records.RESULTS / "quantised.jsonl"
NBITS, GROUP_SIZE = 4, 32


@dataclass(frozen=True)
class Method:
    """How a 4-bit model is adapted, how the adapter is merged into it, and the grid of learning rates."""

    attach: Callable[[Any, Start], nn.Module]
    merge: Callable[[Any], Any]
    merged: str
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)


def qlora(model: Any, start: Start) -> nn.Module:
    """PEFT's LoRA: A random, B zero."""
    from peft import LoraConfig, get_peft_model

    # "all-linear" does not know HQQ's layers
    names = [*target_linears(model)]
    return get_peft_model(model, LoraConfig(r=start.r, lora_alpha=start.r, target_modules=names, task_type="CAUSAL_LM"))


def pooled(model: Any, start: Start, energy: float = 0.0) -> nn.Module:
    """QA-LoRA: A and B learn, A on the means of the groups; with an energy, within what it leaves free of them."""
    config = lora_null.LoraNullConfig(
        r=start.r,
        seed=start.seed,
        train="b_in_basis",
        energy=energy,
        group_pooling=GROUP_SIZE,
        rank_pattern=smaller_ranks(start, energy, GROUP_SIZE),
    )
    return lora_null.initialize(model, start.covariances, config, progress=False)


def unloaded(model: Any) -> Any:
    """Merge as PEFT does: dequantise, add, quantise again."""
    return model.merge_and_unload()


METHODS = {
    "QLoRA": Method(qlora, unloaded, "quantised again"),
    "QA-LoRA": Method(pooled, lora_null.merge, "merged into the zero points"),
    "QA-LoRA, beyond 90 % of the energy": Method(
        partial(pooled, energy=0.9), lora_null.merge, "merged into the zero points"
    ),
}


class Quantised(Bench):
    """The bench of the study with a 4-bit model to train."""

    def quantised(self) -> Any:
        """Load the model and quantise it; scales and zero points have 16 bits."""
        from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

        # its own backward multiplies bf16 gradients by fp32 weights, which autocast would have cast
        HQQLinear.set_backend(HQQBackend.PYTORCH_FORWARD)
        config = BaseQuantizeConfig(nbits=NBITS, group_size=GROUP_SIZE, axis=1)
        model = self.fresh()
        _hqq().quantize_model(model, config, compute_dtype=torch.float32, device="cpu")
        return in_16_bits(model)

    def before(self) -> dict[str, Any]:
        """Return the record of the model as it comes, and quantised."""
        began = time.perf_counter()
        forms = {"full": self.judge(self.base.model, last=True), "quantised": self.judge(self.quantised(), last=True)}
        return self._found(Run(self.name, self.task, BEFORE, 0.0, 0), began, forms)

    def run(self, run: Run) -> dict[str, Any]:
        """Train, judge with the adapter beside the weights, merge, and judge what HQQ reads back."""
        began, method = time.perf_counter(), METHODS[run.method]
        examples = self.lessons(run.seed)
        start = self.start(examples, run.seed)
        torch.manual_seed(run.seed)
        model = method.attach(self.quantised(), start)
        self.train(model, examples, run, weight_decay=0.0)
        forms = {"beside": self.judge(model, last=True)}
        changes = {
            name: layer.scaling * (layer.factor("lora_B") @ layer.factor("lora_A")).detach()
            for name, layer in adapted_layers(model).items()
        }
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        merged = reread(method.merge(model))
        forms["merged"] = self.judge(merged, last=True)
        base = self.quantised()
        codes, lost = zip(*(_moved(base, merged, name, change) for name, change in changes.items()), strict=True)
        return self._found(
            run,
            began,
            forms,
            codes_changed=fmean(codes),
            update_lost=median(lost),
            bits_beside=16 * trained / sum(change.numel() for change in changes.values()),
        )

    def frame(self, run: Run) -> dict[str, Any]:
        """Return the part of a record that says what it is of."""
        return {**super().frame(run), "nbits": NBITS, "group_size": GROUP_SIZE}

    def _found(self, run: Run, began: float, forms: dict[str, Any], **figures: float) -> dict[str, Any]:
        return {
            **self.frame(run),
            "forms": forms,
            **{name: float(f"{value:.5g}") for name, value in figures.items()},
            "seconds": round(time.perf_counter() - began, 1),
            "environment": environment.describe("cpu"),
        }


def in_16_bits(model: Any) -> Any:
    """Round scales and zero points to fp16, as HQQ has them by default; the products stay in the model's own type."""
    for module in model.modules():
        if hasattr(module, "W_q"):
            module.meta |= {key: module.meta[key].half() for key in ("scale", "zero")}
    return model


def reread(model: Any) -> Any:
    """Write the model and read it back, with HQQ's own functions."""
    with tempfile.TemporaryDirectory() as folder:
        _hqq().save_quantized(in_16_bits(model), folder)
        return _hqq().from_quantized(folder, compute_dtype=torch.float32, device="cpu")


def _hqq() -> Any:
    from hqq.models.hf.base import AutoHQQHFModel

    return AutoHQQHFModel


def _moved(base: Any, merged: Any, name: str, change: Tensor) -> tuple[float, float]:
    """Return the share of codes that a merge changed, and what of the change it lost, as a share of its length."""
    before, after = (model.get_submodule(name) for model in (base, merged))
    moved = (before.unpack() != after.unpack()).double().mean()
    lost = (after.dequantize() - before.dequantize() - change).norm() / change.norm()
    return float(moved), float(lost)


def table(entries: Sequence[dict]) -> str:
    """Return a row for the model before, full and quantised, and for each method at each rate beside and merged."""
    head = [
        "rate",
        "seeds",
        "bits a weight",
        "codes changed",
        "error of merging",
        "task loss",
        "facts, reworded: accuracy",
    ]
    rows = [("", *head, "log-likelihood", "KL from the model before, on its own text")]
    before = next(e for e in entries if e["method"] == BEFORE)
    stored = before["nbits"] + 32 / before["group_size"]
    rows.append(("before, not quantised", "", "", "16", "", "", *_figures([before["forms"]["full"]])))
    rows.append(
        (f"before, {before['nbits']} bits", "", "", f"{stored:g}", "", "", *_figures([before["forms"]["quantised"]]))
    )
    for name, method in METHODS.items():
        for rate in method.learning_rates:
            own = [e for e in entries if (e["method"], e["learning_rate"]) == (name, rate)]
            if not own:
                continue
            beside, merged = ([e["forms"][form] for e in own] for form in ("beside", "merged"))
            where = f"{rate:g}", f"{len(own)}"
            bits = f"{stored + fmean(e['bits_beside'] for e in own):.2g}"
            rows.append((f"{name}, beside", *where, bits, "", "", *_figures(beside)))
            shares = (f"{100 * fmean(e[key] for e in own):.1f} %" for key in ("codes_changed", "update_lost"))
            rows.append((f"{name}, {method.merged}", *where, f"{stored:g}", *shares, *_figures(merged)))
    sizes, where = before["sizes"], before["environment"]
    return (
        f"{predictions.markdown(rows)}\n\n*{before['model']} by HQQ, {before['nbits']} bits in groups of "
        f"{before['group_size']}, scales and zero points in fp16; {before['task']}, rank {sizes['r']} or as many as "
        f"there are directions, {sizes['steps']} steps of {sizes['batch_size']} at a constant rate after warm-up, bf16 "
        f"autocast; {sizes['items']} facts, {sizes['tasks']} held-out examples of the task, {sizes['documents']} texts "
        f"of {sizes['document_tokens']} tokens; in square brackets 95 % intervals over these, seeds averaged. Error "
        "of merging: length of what the merged weights are off from base plus adapter, over the adapter's, median "
        f"of the layers. {where['device']}, torch {where['torch']}.*"
    )


def _figures(found: Sequence[dict[str, list[float]]]) -> list[str]:
    cells = []
    for key, digits in (("task", 3), ("facts_right", 3), ("facts", 2), ("kl", 4)):
        items = torch.tensor([form[key] for form in found], dtype=torch.float64).mean(0)
        known = estimates({key: items}, torch.ones(len(items)))[key]
        interval = f" [{known.low:.{digits}f}, {known.high:.{digits}f}]" if key == "kl" else ""
        cells.append(f"{known.value:.{digits}f}{interval}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retention.quantised", description=__doc__)
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=int, choices=(1, 2), default=2, help="of each grid, the first ones")
    parser.add_argument("--knowledge", type=Path, help=".jsonl file of questions and answers, as NQ-Open")
    parser.add_argument("--task", type=Path, help=".jsonl file of questions and worked answers, as GSM8K")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=cache_folder() / "retention")
    arguments = parser.parse_args()
    source, task = models.SMOLLM2, arguments.task.stem if arguments.task else "problems"
    files = (arguments.knowledge, arguments.task)
    bench = Quantised(source.name, str(models.fetch_model(source=source)), task, files, Sizes(), arguments.cache)
    runs = [Run(source.name, task, BEFORE, 0.0, 0)]
    for rank, seed, name in product(range(arguments.rates), range(arguments.seeds), arguments.method or METHODS):
        runs.append(Run(source.name, task, name, METHODS[name].learning_rates[rank], seed))
    for run in runs:
        frame = json.loads(json.dumps(bench.frame(run)))
        known = records.read_runs(arguments.output)
        if not any(all(record.get(key) == value for key, value in frame.items()) for record in known):
            record = bench.before() if run.method == BEFORE else bench.run(run)
            records.append(arguments.output, record)
            told = {form: _figures([judged]) for form, judged in record["forms"].items()}
            print(run.method, run.learning_rate, run.seed, told, f"{record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
