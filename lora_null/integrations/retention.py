"""A callback for ``transformers.Trainer`` that measures forgetting while it happens."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from ..adapters.layer import adapter_layers
from ..covariances.covariances import Covariances
from ..evaluation import Evaluation, evaluate
from ..evaluation.documents import Text, read_documents
from ..evaluation.report import response
from ..peft.save import changes_of
from ..system.log import logger

PREFIX = "retention_"


class RetentionCallback(TrainerCallback):
    """Measure a model beside the pre-trained one while it is trained, and stop the run when it has forgotten too much.

    Every ``every`` steps, and at the last, :func:`lora_null.evaluate` compares the model with itself without its
    adapter; that costs two forward passes over ``keep``, so a few dozen documents are enough. The figures go into the
    trainer's ``log_history`` as ``retention_forgetting`` (change of the cross-entropy on ``keep``, nats per token) with
    ``retention_forgetting_low`` and ``_high``, ``retention_kl``, ``retention_agreement``, ``retention_accuracy`` with
    questions, and ``retention_leakage`` with covariances: the median over the layers of
    :attr:`lora_null.evaluation.report.LayerUpdate.response`. For TensorBoard, W&B and other reports, which only the
    trainer reaches, call :meth:`set_trainer`.

    A checkpoint that is saved at a measured step within the bound becomes the best one
    (``state.best_model_checkpoint``), which ``save_total_limit`` spares and ``load_best_model_at_end`` loads: let
    ``save_steps`` be a multiple of ``every``.

    Args:
        keep: Text that the model should not forget: a file or a list of documents.
        every: Steps between measurements.
        stop_above: The largest forgetting that is accepted, in nats per token; None only measures. 0.05 is what LoRA
            of rank 32 costs Llama-3.2-3B in PEFT's benchmark after 5,000 steps.
        stop: Stop the run where the bound is passed; otherwise go on, and only mark what was within it.
        questions: As in :func:`lora_null.evaluate`.
        covariances: Of the pre-trained model, for the leakage.
        tokenizer: Of the model; None takes the trainer's ``processing_class``.
        options: Passed to :func:`lora_null.evaluate`: ``batch_size``, ``sequence_length``, ``base``, ...

    Raises:
        ValueError: ``every`` is not positive, ``stop_above`` is negative, or ``keep`` is empty; from the trainer, what
            :func:`lora_null.evaluate` refuses.

    Attributes:
        history: ``(step, Evaluation)`` of every measurement.
        kept_step: The last measured step within the bound; None before it.
    """

    def __init__(
        self,
        keep: str | os.PathLike | Sequence[Text],
        *,
        every: int = 100,
        stop_above: float | None = None,
        stop: bool = True,
        questions: str | os.PathLike | Sequence[Mapping[str, Any]] | None = None,
        covariances: Covariances | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        if every < 1 or not (stop_above is None or stop_above >= 0):
            raise ValueError(
                f"every is {every} and stop_above {stop_above}; expected a positive number of steps, and a bound of "
                "nats per token that is not negative, or None."
            )
        self.keep = read_documents("keep", keep)
        self.every, self.stop_above, self.stop = every, stop_above, stop
        self.questions, self.covariances, self.tokenizer = questions, covariances, tokenizer
        self.options = {"progress": False, **options}
        self.history: list[tuple[int, Evaluation]] = []
        self.kept_step: int | None = None
        self._log: Any = None

    def set_trainer(self, trainer: Any) -> RetentionCallback:
        """Log through ``trainer``, so that the figures reach everything that it reports to; returns the callback."""
        self._log = trainer.log
        return self

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> Any:
        """Measure where it is due."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return control
        tokenizer = self.tokenizer or processing_class
        if tokenizer is None:
            raise ValueError("The trainer has no processing_class; pass the tokenizer to it or to RetentionCallback.")
        found = evaluate(model, tokenizer, keep=self.keep, questions=self.questions, **self.options)
        self.history.append((state.global_step, found))
        figures = self._figures(model, found)
        if self._log is None:
            state.log_history.append({**figures, "epoch": state.epoch, "step": state.global_step})
        else:
            self._log(figures)
        forgetting = figures[f"{PREFIX}forgetting"]
        if self.stop_above is None or forgetting <= self.stop_above:
            self.kept_step = state.global_step
        elif self.stop:
            logger.warning(
                "Stopped at step %d: forgetting is %.4g nats per token, above stop_above=%g. The last measured step "
                "within the bound is %s.",
                state.global_step,
                forgetting,
                self.stop_above,
                self.kept_step,
            )
            control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as the best where its step was measured and within the bound."""
        if self.stop_above is not None and self.kept_step == state.global_step:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            state.best_global_step = state.global_step

    def _figures(self, model: Any, found: Evaluation) -> dict[str, float]:
        assert found.keep is not None
        change = found.keep.cross_entropy.change
        figures = {
            "forgetting": change.value,
            "kl": found.keep.kl.value,
            "agreement": found.keep.agreement.value,
        }
        if change.low is not None and change.high is not None:
            figures |= {"forgetting_low": change.low, "forgetting_high": change.high}
        if found.questions is not None:
            figures["accuracy"] = found.questions.accuracy.after.value
        if self.covariances is not None:
            answers = [response(A, B, self.covariances[name]) for name, (A, B) in _updates(model).items()]
            # Before the first step B is zero, and there is no update to speak of.
            figures["leakage"] = median([answer for answer in answers if answer is not None] or [0.0])
        return {PREFIX + key: value for key, value in figures.items()}


def _updates(model: Any) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return fp32 ``A (r, d)`` and ``B (m, r)`` of each layer, with ``B A`` its change of the pre-trained weight."""
    own = {name: layer.low_rank_delta() for name, layer in adapter_layers(model).items()}
    return own or changes_of(model, getattr(model, "active_adapter", "default"))
