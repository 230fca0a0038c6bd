"""PEFT's MetaMathQA comparison with a start of this package, run in PEFT's own folder; README.md says how."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import utils  # PEFT's, which lies beside this file then

import lora_null
import lora_null.peft
from lora_null.calibration.texts import token_batches

# PEFT measures forgetting on the first hundred articles of the same stream, which calibration must not see.
SKIPPED = 1000
LENGTH = 768


def articles(count: int) -> list[str]:
    """Return articles of the encyclopedia that forgetting is measured on, others than those."""
    from datasets import load_dataset

    rows = load_dataset("HuggingFaceFW/finewiki", split="train", streaming=True).skip(SKIPPED).take(count)
    return [row["text"] for row in rows]


def starting(attach: Callable[..., Any], start: dict[str, Any]) -> Callable[..., Any]:
    """Return PEFT's ``get_peft_model`` with the null space of the base's activations as its start."""

    def get_peft_model(base: Any, config: Any, **options: Any) -> Any:
        tokenizer = utils.get_tokenizer(model_id=base.config._name_or_path, max_seq_length=LENGTH)
        texts = articles(start["articles"])
        batches = token_batches(tokenizer, texts, sequence_length=LENGTH, batch_size=4)
        targets = lora_null.LoraNullConfig(target_modules=sorted(config.target_modules))
        covariances = lora_null.calibrate(base, batches, targets)
        model = attach(base, config, **options)
        chosen = {"train": start["train"], "energy": start.get("energy")}
        return lora_null.peft.initialize_lora_null_weights(model, covariances, **chosen)

    return get_peft_model


def main() -> None:
    """Run PEFT's program with the arguments that it takes."""
    experiment = next(Path(word) for word in sys.argv[1:] if not word.startswith("-"))
    start = json.loads((experiment / "start.json").read_text(encoding="utf-8"))
    utils.get_peft_model = starting(utils.get_peft_model, start)
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
