"""Modules that wrap another: torch.compile, data parallel, PEFT."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

# Modules that FSDP1, torch.compile and activation checkpointing put into a model, and its names with them.
_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
# The attribute by which an adapted model is known: what it remembers of its adapters (adapters/state.py).
STATE = "lora_null_state"


def unwrapped(model: Any) -> Any:
    """Return the adapted model inside DDP, FSDP1, torch.compile, a DeepSpeed engine or a module of a user's own.

    Weights that FSDP2 has left gathered are put back.
    After a forward without a backward, the outermost part of an FSDP2 model holds copies of its weights; a change
    of them would be lost.
    """
    # Half a second to import, and nothing to look for where nobody has.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel, *([fsdp.FullyShardedDataParallel] if fsdp else []))
    while isinstance(model, kinds) or "_orig_mod" in model._modules:
        model = model.module if isinstance(model, kinds) else model._orig_mod
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
    # Names of modules go into adapters, so that a wrapper must not add to them.
    holders = [module for module in model.modules() if STATE in module.__dict__]
    return holders[0] if len(holders) == 1 else model


def uncompiled(model: Any) -> Any:
    """Return the model inside torch.compile, whose modules have the names that covariances and adapters know."""
    while "_orig_mod" in model._modules:
        model = model._orig_mod
    return model


def plain_name(name: str) -> str:
    """Return the name that a module has in the model before it was wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
