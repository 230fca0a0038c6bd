"""Fine-tuning on the word problems with ``transformers.Trainer``, the same way for every method."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .problems import Problem

IGNORED = -100
Example = dict[str, list[int]]


def encode_problems(tokenizer, problems: Sequence[Problem], *, learn_prompt: bool = False) -> list[Example]:
    """Tokenise problems, each with the end token.

    Args:
        tokenizer: Of the model.
        problems: What to encode.
        learn_prompt: Every token is a label, as in plain causal language modelling; otherwise the worked answer
            and the end token only.
    """
    examples = []
    for problem in problems:
        prompt = tokenizer(problem.prompt)["input_ids"]
        answer = tokenizer(problem.completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        labels = (prompt if learn_prompt else [IGNORED] * len(prompt)) + answer
        examples.append({"input_ids": prompt + answer, "labels": labels})
    return examples


def pad_batch(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Pad examples on the right to one ``(batch, length)``; padding is no label and not attended to."""
    length = max(len(example["input_ids"]) for example in examples)
    rows = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    batch: dict[str, list[list[int]]] = {key: [] for key in rows}
    for example in examples:
        values = {**example, "attention_mask": [1] * len(example["input_ids"])}
        for key, fill in rows.items():
            batch[key].append(values[key] + [fill] * (length - len(values[key])))
    return {key: torch.tensor(value) for key, value in batch.items()}


def fine_tune(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **arguments: Any,
) -> list[float]:
    """Train what requires gradients: AdamW without weight decay, linear warm-up over a tenth of ``steps``, cosine.

    The order of the examples depends on ``seed`` only, so that two methods see the same batches. ``after_step`` is
    called with the number of steps done. ``optimizer`` stands in for AdamW, ``arguments`` for those of the trainer.

    Returns:
        The training loss of every step, in nats per label.
    """
    from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

    losses: list[float] = []

    class ShowLoss(TrainerCallback):
        """Keeps the losses and draws one bar; the trainer's own callbacks print a line per step."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.bar = tqdm(total=steps, desc="train", unit="step", disable=not progress)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))
                self.bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
                self.bar.update()

        def on_step_end(self, args, state, control, **kwargs):
            if after_step is not None:
                after_step(state.global_step)

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    with tempfile.TemporaryDirectory() as scratch:
        chosen: dict[str, Any] = dict(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            weight_decay=0.0,
            logging_strategy="steps",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            seed=seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**chosen | arguments),
            optimizers=(optimizer, None),
            train_dataset=list(examples),  # type: ignore[arg-type]
            data_collator=pad_batch,
            callbacks=[ShowLoss()],
        )
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return losses
