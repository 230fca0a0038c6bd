"""What calibrate and init read: texts, one or several, with weights, and text that the model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import parse_names

# Tokens of a text that are read, and of a document; own_text has defaults of its own for what it writes.
_MAX_TOKENS, _SEQUENCE_LENGTH, _BATCH_SIZE = 65536, 512, 16


@dataclass(frozen=True)
class Text:
    """The flags of one run, checked on creation: nothing is read, loaded or written before.

    Attributes:
        data: Files and data sets, see :func:`lora_null.text_batches`.
        generate: Tokens that the model writes itself.
        weights: A number for each text, with commas, that of ``generate`` last.
        field: Of objects and rows.
        roles: Of the messages that count, with commas.
        max_tokens: Of each text.
        sequence_length: Of a document.
        batch_size: Documents per forward pass.
        mask: Which tokens count.
    """

    data: Sequence[Path]
    generate: int | None
    weights: str | None
    field: str | None
    roles: str | None
    max_tokens: int | None
    sequence_length: int | None
    batch_size: int | None
    mask: str

    def __post_init__(self) -> None:
        from ..calibration.texts import check_sizes, check_weights

        names = ("generate", "max_tokens", "sequence_length", "batch_size")
        check_sizes(**{name: getattr(self, name) for name in names})
        check_weights(self._numbers, len(self.data) + (self.generate is not None))
        idle = [name for name in ("field", "roles", "max_tokens") if getattr(self, name) is not None]
        if idle and not self.data:
            raise ValueError(
                f"{' and '.join(idle)}: of texts that are read, and there is no --data. How many tokens are written is "
                "what --generate says, and how long a document is what --sequence-length says."
            )
        if self.roles is not None and self.mask != "attention":
            raise ValueError(
                f"mask is {self.mask!r} beside roles, which say themselves which tokens count; expected one of the two."
            )

    @property
    def counted(self) -> str:
        """The mask of the calibration."""
        return self.mask if self.roles is None else "labels"

    @property
    def sources(self) -> list[str]:
        """What is calibrated on, in words."""
        own = [] if self.generate is None else ["text that the model wrote"]
        return [*map(str, self.data), *own]

    def read(self, tokenizer: Any, seed: int) -> list[dict[str, Any]]:
        """Return batches of the texts; none where there are none."""
        from ..calibration.texts import text_batches

        if not self.data:
            return []
        numbers = self._numbers
        return text_batches(
            tokenizer,
            list(self.data),
            weights=None if numbers is None else numbers[: len(self.data)],
            field=self.field,
            roles=parse_names(self.roles),
            max_tokens=self.max_tokens or _MAX_TOKENS,
            sequence_length=self.sequence_length or _SEQUENCE_LENGTH,
            batch_size=self.batch_size or _BATCH_SIZE,
            seed=seed,
        )

    def written(self, model: Any, tokenizer: Any, seed: int, *, progress: bool, dry_run: bool) -> list[dict[str, Any]]:
        """Return batches that the model has written; ``dry_run``: others of the same sizes."""
        from ..calibration.own_text import own_text, unwritten_text
        from ..calibration.texts import with_weight

        if self.generate is None:
            return []
        given = {"sequence_length": self.sequence_length, "batch_size": self.batch_size}
        sizes: dict[str, Any] = {name: size for name, size in given.items() if size is not None}
        batches: list[dict[str, Any]]
        if dry_run:
            batches = unwritten_text(tokenizer, self.generate, **sizes)
        else:
            batches = own_text(model, tokenizer, self.generate, **sizes, seed=seed, progress=progress)
        return batches if self._numbers is None else with_weight(batches, self._numbers[-1])

    @property
    def _numbers(self) -> list[float] | None:
        return parse_weights(self.weights)


def parse_weights(text: str | None) -> list[float] | None:
    """Read numbers with commas between them."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"weights is {text!r}; expected numbers with commas, such as 1,0.5.") from None
