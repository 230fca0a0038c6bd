"""Every method of the study by its name, its grid of learning rates and its calibration text."""

from __future__ import annotations

from functools import partial

from .ablations import as_published, most_used, random, varied
from .methods import (
    MODERATE,
    Method,
    corda,
    eva,
    fa_optimizer,
    full,
    lora,
    lora_null_frozen,
    lora_null_task,
    lora_null_trained,
    lora_random_a_frozen,
    mica,
    milora,
    null_basis,
    null_basis_task,
    olora,
    pissa,
    rslora,
)

# Frozen factors take, and need, longer steps.
STEEP = (1e-3, 3e-3, 1e-2)
# Methods whose two factors do not start at zero need a tenth of the learning rate of those that do; LoRA drifts less at
# such a rate, too.
GENTLE = (1e-4, 3e-4, 1e-3)
# Calibration texts beside the usual one, which has facts and questions with their answers, and what they are called.
TEXTS = {
    "bare": "bare questions",
    "own": "its own text",
    "bare+own": "bare questions and its own text",
    "words+own": "the usual text and its own",
}

METHODS: dict[str, Method] = {
    "LoRA": Method(lora, GENTLE),
    "LoRA, decay 0.3": Method(lora, GENTLE, weight_decay=0.3),
    "LoRA-Null": Method(lora_null_frozen, STEEP),
    "LoRA-Null, A trained": Method(lora_null_trained, GENTLE),
    "CorDA": Method(corda, GENTLE),
    "Null-Basis, 99 %": Method(null_basis),
    "Null-Basis, 99.9 %": Method(partial(null_basis, energy=0.999)),
    "Null-Basis, task-aware": Method(null_basis_task),
    "LoRA-Null, task-aware": Method(lora_null_task, STEEP),
    "LoRA, random A frozen": Method(lora_random_a_frozen, STEEP),
    "full": Method(full, (1e-5, 3e-5, 1e-4)),
    "MiLoRA": Method(milora, GENTLE),
    "LoRA-FA": Method(lora_random_a_frozen, optimizer=fa_optimizer),
    "rsLoRA": Method(rslora, GENTLE),
    "PiSSA": Method(pissa, GENTLE),
    "OLoRA": Method(olora, GENTLE),
    "EVA": Method(eva),
    "MiCA": Method(mica),
    **{
        f"{name}, on {label}": Method(attach, rates, text=text)
        for text, label in TEXTS.items()
        for name, attach, rates in (
            ("LoRA-Null", lora_null_frozen, STEEP),
            ("Null-Basis", null_basis, MODERATE),
        )
    },
    # what a method is without one of its parts
    **{f"LoRA, r = {r}": Method(varied(lora, r=r)) for r in (8, 128)},
    **{f"LoRA-Null, r = {r}": Method(varied(lora_null_frozen, r=r), STEEP) for r in (8, 128)},
    **{f"Null-Basis, r = {r}": Method(varied(null_basis, r=r)) for r in (8, 128)},
    "LoRA-Null, most used directions": Method(varied(lora_null_frozen, sums=most_used), STEEP),
    "LoRA-Null, random directions": Method(varied(lora_null_frozen, sums=random), STEEP),
    "LoRA-Null, sums as published": Method(varied(lora_null_frozen, sums=as_published), STEEP),
    **{f"LoRA-Null, 1/{n} of the text": Method(lora_null_frozen, STEEP, text=f"words/{n}") for n in (4, 16)},
    **{f"Null-Basis, 1/{n} of the text": Method(null_basis, text=f"words/{n}") for n in (4, 16)},
}
# Those that the question is about; every seed of theirs is run before any other method.
CONTENDERS = tuple(METHODS)[:7]
