"""The one configuration object, shared by calibration, initialisation, saving and the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

ALL_LINEAR = "all-linear"


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def helped(text: str, default: Any) -> Any:
    """Return a dataclass field with the help text of the command-line flag that sets it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class LoraNullConfig:
    """How the adapters are made.

    Attributes:
        r: Rank of the adapters: how many of the least used input directions each layer may learn in.
        lora_alpha: Numerator of the scaling ``lora_alpha / r``. ``None`` means ``r``, the paper's scaling of 1.
        target_modules: ``"all-linear"`` (every linear layer except the output head), a regular expression
            that must match the whole module name, or a list of name suffixes, as in PEFT.
        freeze_a: Train only ``lora_B`` and leave the base weights untouched. The update then stays inside
            the null space whatever the optimiser does, and the adapter is an ordinary one of rank ``r``.
            ``False`` trains both factors on a shifted base: more capacity, no such guarantee, and an export
            of rank ``2 r``.
        lora_dropout: Dropout on the adapter's input while training, in ``[0, 1)``.
        seed: Seed of every randomised step of the initialisation.
    """

    r: int = helped("Rank of the adapters.", 128)
    lora_alpha: float | None = helped("Numerator of the scaling lora_alpha / r; defaults to r.", None)
    target_modules: str | Sequence[str] = helped("all-linear, a regular expression or name suffixes.", ALL_LINEAR)
    freeze_a: bool = helped("Train lora_B only, on the untouched base.", True)
    lora_dropout: float = helped("Dropout on the adapter's input.", 0.0)
    seed: int = helped("Seed of every randomised step.", 0)

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}; expected a positive integer, for instance r=128.")
        if self.lora_alpha is not None and not (_is_number(self.lora_alpha) and 0 < self.lora_alpha < math.inf):
            raise ValueError(
                f"lora_alpha is {self.lora_alpha!r}; expected a positive number, or None for lora_alpha = r."
            )
        if not (_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}; expected a probability in [0, 1).")
        if not isinstance(self.freeze_a, bool):
            raise ValueError(f"freeze_a is {self.freeze_a!r}; expected True or False.")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}; expected an integer.")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if not self.target_modules:
            raise ValueError('target_modules is empty; expected "all-linear", a regular expression or names.')

    @property
    def scaling(self) -> float:
        """The factor ``s = lora_alpha / r`` in ``y = x W^T + s (x A^T) B^T``."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.r

    def to_dict(self) -> dict:
        """Return the fields as plain JSON values."""
        values = asdict(self)
        if not isinstance(self.target_modules, str):
            values["target_modules"] = list(self.target_modules)
        return values

    @classmethod
    def from_dict(cls, values: dict) -> LoraNullConfig:
        """Build from :meth:`to_dict`; keys of newer versions are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})
