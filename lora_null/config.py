"""The one configuration object, shared by calibration, initialisation, saving and the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

ALL_LINEAR = "all-linear"
# What is trained, and whether lora_A is frozen then.
TRAIN = {"b": True, "b_in_basis": False, "ab": False}
BASIS_DTYPES = ("float32", "bfloat16", "float64")
# Retention and learning are best from 0.95 on (arXiv 2609.25618, table of ablations), where a third of the directions
# is free.
ENERGY = 0.99


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_alpha(value) -> bool:
    # Python's integers know no end, and a larger number would overflow in fp32
    return _is_number(value) and 0 < value < 1e30


def helped(text: str, default: Any, **options: Any) -> Any:
    """Return a dataclass field with the help text of the command-line flag that sets it."""
    return field(default=default, metadata={"help": text}, **options)


def pattern_key(patterns: Iterable[str], name: str) -> str | None:
    """Return the first of ``patterns`` that selects the module ``name``, as PEFT reads a ``rank_pattern``.

    A pattern is a regular expression for the end of the name, after a dot or from its start.
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


@dataclass(frozen=True)
class LoraNullConfig:
    """How the adapters are made.

    Attributes:
        r: Rank of the adapters: how many of the least used input directions each layer may learn in.
        lora_alpha: Numerator of the scaling ``lora_alpha / r``. ``None`` means the rank of each layer: the paper's
            scaling of 1.
        target_modules: ``"all-linear"`` (every linear layer except the output head and, in a language model, what
            reads images or sounds), a regular expression that must match the whole module name, or a list of name
            suffixes, as in PEFT.
        freeze_a: A short word for two values of ``train``: ``True`` for ``"b"``, ``False`` for ``"ab"``. Afterwards it
            says whether ``lora_A`` is frozen.
        lora_dropout: Dropout on the adapter's input while training, in ``[0, 1)``.
        seed: Seed of every randomised step of the initialisation.
        exclude_modules: Layers that get no adapter although ``target_modules`` selects them: a regular expression
            for whole names, or name suffixes.
        layers_to_transform: Numbers of the decoder layers in which adapters are made; ``None``: in all. Goes with
            ``"all-linear"`` or name suffixes.
        layers_pattern: Names of the module list that the numbers count, where a model has several.
        rank_pattern: Ranks other than ``r``: a regular expression for the end of a module name to the rank.
        alpha_pattern: The same for ``lora_alpha``.
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` instead of ``lora_alpha / r``.
        modules_to_save: Suffixes of modules that train as they are, such as a new classification head; they get no
            adapters, and go into the adapter's file whole.
        train: What learns. ``"b_in_basis"``, the default: ``lora_B`` and ``lora_A``, whose rows stay in the free
            directions (Null-Basis LoRA, arXiv 2609.25618): ``A = C N^T`` with ``C`` trained. ``"b"``: ``lora_B`` alone.
            With both the base weights are untouched, the update leaves alone what is protected whatever the optimiser
            does, and the adapter is an ordinary one of rank ``r``. ``"ab"`` trains both factors freely on a shifted
            base: no such guarantee, and an export of rank ``2 r``.
        energy: Share of the activations' energy to protect, in ``[0, 1)``: the directions beyond it are free, a number
            that differs between layers; fewer than ``r`` are refused. ``None``: for ``"b_in_basis"`` 0.99, or less in
            a layer where only that leaves ``r`` directions; else the ``r`` least used directions are free.
        basis_dtype: Of the free directions in memory: ``"float32"``, ``"float64"``, or ``"bfloat16"`` for half the
            memory and about ``2^-9`` of A's length in the protected directions.
        target_parameters: Names, or ends of names, of parameters that hold the matrices of a layer's experts, such as
            ``["experts.gate_up_proj", "experts.down_proj"]``, as in PEFT: :func:`lora_null.calibrate` sums what they
            read too, for :func:`lora_null.peft.initialize_lora_null_weights`. ``target_modules`` may be empty then.
        group_pooling: QA-LoRA (arXiv 2309.14717): the adapter reads the mean of each group of so many inputs, and
            :func:`lora_null.merge` puts it into the zero points of a base that is quantised in groups of that size.
            ``"auto"``: the group size of the base. Goes with the modes that leave the base untouched.
    """

    r: int = helped("Rank of the adapters.", 128)
    lora_alpha: float | None = helped("Scaling is lora_alpha / r; default: r.", None)
    target_modules: str | Sequence[str] = helped("all-linear, a regular expression or name suffixes.", ALL_LINEAR)
    freeze_a: bool | None = helped("Short for --train b, and for --train ab.", None)
    lora_dropout: float = helped("Dropout on the input.", 0.0)
    seed: int = helped("Seed of every randomised step.", 0)
    exclude_modules: str | Sequence[str] | None = helped("Layers left out, written likewise.", None)
    layers_to_transform: int | Sequence[int] | None = helped("Numbers of the layers, with commas.", None)
    layers_pattern: str | Sequence[str] | None = helped("Module list that the numbers count.", None)
    # A dictionary has no hash; configurations that differ in these only share theirs.
    rank_pattern: Mapping[str, int] | None = helped("NAME=R for some layers; repeatable.", None, hash=False)
    alpha_pattern: Mapping[str, float] | None = helped("NAME=ALPHA likewise.", None, hash=False)
    use_rslora: bool = helped("Scale by lora_alpha / sqrt(r).", False)
    modules_to_save: Sequence[str] | None = helped("Modules that train whole, such as a head.", None)
    train: str | None = helped("b_in_basis (default), b or ab: what learns.", None)
    energy: float | None = helped("Share to protect; default in a basis: 0.99.", None)
    basis_dtype: str = helped("Of the free directions: float32, bfloat16, float64.", "float32")
    group_pooling: int | str | None = helped("Inputs read as their mean, or auto.", None)
    target_parameters: Sequence[str] | None = helped("Parameters that hold experts, with commas.", None)

    def __post_init__(self):
        if not _is_rank(self.r):
            raise ValueError(f"r is {self.r!r}; expected a positive integer, for instance r=128.")
        if self.lora_alpha is not None and not _is_alpha(self.lora_alpha):
            raise ValueError(
                f"lora_alpha is {self.lora_alpha!r}; expected a positive number, or None for lora_alpha = r."
            )
        if not (_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}; expected a probability in [0, 1).")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora is {self.use_rslora!r}; expected True or False.")
        self._check_training()
        if not isinstance(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}; expected an integer.")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if not self.target_modules and not self.target_parameters:
            raise ValueError('target_modules is empty; expected "all-linear", a regular expression or names.')
        if not isinstance(self.target_modules, str) and not all(isinstance(name, str) for name in self.target_modules):
            raise ValueError(f"target_modules is {self.target_modules!r}; expected names, or one string.")
        self._check_choices()
        self._check_pattern("rank_pattern", _is_rank, "ranks, positive integers")
        self._check_pattern("alpha_pattern", _is_alpha, "positive numbers")

    def _check_training(self) -> None:
        """Bring ``train`` and ``freeze_a`` to one answer."""
        if not isinstance(self.freeze_a, bool | None):
            raise ValueError(f"freeze_a is {self.freeze_a!r}; expected True, False or None.")
        if self.train not in (None, *TRAIN):
            raise ValueError(f"train is {self.train!r}; expected one of {', '.join(TRAIN)}.")
        train = self.train or {True: "b", False: "ab", None: "b_in_basis"}[self.freeze_a]
        if self.freeze_a not in (None, TRAIN[train]):
            raise ValueError(
                f"freeze_a is {self.freeze_a!r} beside train={train!r}, which means {TRAIN[train]}; expected one of "
                "the two. Give train, and freeze_a=None where a configuration is changed by dataclasses.replace."
            )
        if self.energy is not None and not (_is_number(self.energy) and 0 <= self.energy < 1):
            raise ValueError(
                f"energy is {self.energy!r}; expected a share in [0, 1), for instance energy=0.99, or None."
            )
        if self.basis_dtype not in BASIS_DTYPES:
            raise ValueError(f"basis_dtype is {self.basis_dtype!r}; expected one of {', '.join(BASIS_DTYPES)}.")
        L = self.group_pooling
        if L is not None and L != "auto" and not (isinstance(L, int) and _is_rank(L) and L > 1):
            raise ValueError(f'group_pooling is {L!r}; expected a number of inputs from 2 on, "auto", or None.')
        if L is not None and train == "ab":
            raise ValueError(
                f"group_pooling is {L!r} beside train='ab', whose A would not keep equal entries in a group and whose "
                "base is shifted; expected train='b', or 'b_in_basis' for an A that learns (energy=0: in all "
                "directions, as QA-LoRA has it)."
            )
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "freeze_a", TRAIN[train])

    def _check_choices(self) -> None:
        """Bring what narrows the choice of layers into one form: a regular expression, a tuple, or ``None``."""
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save is {self.modules_to_save!r}; expected a list of module names.")
        for name, kind in (
            ("exclude_modules", str),
            ("layers_to_transform", int),
            ("layers_pattern", str),
            ("modules_to_save", str),
            ("target_parameters", str),
        ):
            value = getattr(self, name)
            if name == "exclude_modules" and isinstance(value, str):
                continue
            parts = () if value is None else (value,) if isinstance(value, kind) else value
            if not isinstance(parts, Sequence | set | frozenset) or not all(
                isinstance(part, kind) and not isinstance(part, bool) and part != "" for part in parts
            ):
                expected = "numbers" if kind is int else "names"
                raise ValueError(f"{name} is {value!r}; expected {expected}, for instance in a list, or None.")
            ordered = sorted(parts) if isinstance(parts, set | frozenset) else parts
            object.__setattr__(self, name, tuple(ordered) or None)
        if self.layers_to_transform is None and self.layers_pattern is not None:
            raise ValueError(
                f"layers_pattern is {self.layers_pattern!r} without layers_to_transform; expected the numbers of the "
                "layers too."
            )
        if self.layers_to_transform and isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            raise ValueError(
                f"layers_to_transform is {self.layers_to_transform!r} beside the regular expression "
                f'{self.target_modules!r}; expected "all-linear" or name suffixes with it. Put the numbers into the '
                "expression."
            )

    def _check_pattern(self, name: str, fits: Any, expected: str) -> None:
        value = getattr(self, name)
        wrong = (
            f"{name} is {value!r}; expected a dictionary of ends of module names, regular expressions, to {expected}"
        )
        if not isinstance(value, Mapping | None) or not all(isinstance(key, str) for key in value or ()):
            raise ValueError(f"{wrong}.")
        for key, number in (value or {}).items():
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{wrong}: {key!r} is no regular expression ({error}).") from None
            if not fits(number):
                raise ValueError(f"{wrong}, but {key!r} has {number!r}.")
        object.__setattr__(self, name, dict(value) if value else None)

    @property
    def scaling(self) -> float:
        """The factor ``s`` in ``y = x W^T + s (x A^T) B^T`` of the layers that no pattern names."""
        return self._scaling(self.r, self.lora_alpha)

    @property
    def protected(self) -> float | None:
        """Share of the energy that is protected; ``None``: whatever the ``r`` least used directions leave."""
        return ENERGY if self.energy is None and self.train == "b_in_basis" else self.energy

    def rank_of(self, name: str) -> int:
        """Return the rank of the adapter on the module ``name``."""
        key = pattern_key(self.rank_pattern or (), name)
        return self.r if self.rank_pattern is None or key is None else self.rank_pattern[key]

    def scaling_of(self, name: str) -> float:
        """Return the factor ``s`` of the adapter on the module ``name``."""
        key = pattern_key(self.alpha_pattern or (), name)
        lora_alpha = self.lora_alpha if self.alpha_pattern is None or key is None else self.alpha_pattern[key]
        return self._scaling(self.rank_of(name), lora_alpha)

    def _scaling(self, r: int, lora_alpha: float | None) -> float:
        return (r if lora_alpha is None else lora_alpha) / (r**0.5 if self.use_rslora else r)

    def to_dict(self) -> dict:
        """Return the fields as plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> LoraNullConfig:
        """Build from :meth:`to_dict`; keys of newer versions are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})
