"""Random models of real shapes, copies that share their base weights, and adapters for them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .peers.layers import Attach, attach_ours, share_projections

Adapters = dict[str, tuple[Tensor, Tensor]]  # module name within a decoder layer -> A (r, d), B (m, r)


def random_model(shape, *, layers: int, vocab_size: int, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """Return a frozen LLaMA of the given shape with random weights, in training mode."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(shape.config(layers=layers, vocab_size=vocab_size))
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train()


def sharing_copy(model: Any) -> Any:
    """Return a copy whose parameters and buffers are the very tensors of ``model``."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def random_adapters(shape, *, r: int, dtype: torch.dtype, device: str, seed: int = 1) -> Adapters:
    """Return factors for the seven linears of a decoder layer.

    Linears that read the same tensor have A's with one row space, ``A_i = D_i U^T``, as LoRA-Null makes them.
    """
    generator = torch.Generator(device).manual_seed(seed)
    bases: dict[str, Tensor] = {}
    adapters = {}
    for linear in shape.linears:
        if linear.group not in bases:
            bases[linear.group] = _orthonormal(linear.d, r, generator, device)
        mixing = _orthonormal(r, r, generator, device)
        B = torch.randn(linear.m, r, generator=generator, device=device) * r**-0.5
        adapters[linear.name] = (mixing @ bases[linear.group].T).to(dtype), B.to(dtype)
    return adapters


def _orthonormal(rows: int, columns: int, generator: torch.Generator, device: str) -> Tensor:
    values = torch.randn(rows, columns, generator=generator, device=device)
    return torch.linalg.qr(values)[0]


def attach_all(layers: Iterable[Any], adapters: Adapters, attach: Attach, *, train_a: bool) -> None:
    """Put the adapters on every decoder layer; ours share the projections of a sharing group, as always."""
    for layer in layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, (A, B) in adapters.items():
                if hasattr(parent, name):
                    attach(parent, name, A, B, train_a)
        if attach is attach_ours:
            share_projections(layer)


def trained_b(layer: Any, adapters: Adapters) -> dict[str, nn.Parameter]:
    """Return the ``lora_B`` parameter of each linear of a decoder layer, whoever made it."""
    found = {}
    for name in adapters:
        parent = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
        for path, parameter in getattr(parent, name).named_parameters():
            if "lora_B" in path:
                found[name] = parameter
    return found


def variants() -> list[tuple[str, Attach | None, dict]]:
    """Return ``(provider, attach, options)`` of everything that adapts a whole model; no attach: the bare base."""
    from .peers import layers

    return [
        ("lora_null", layers.attach_ours, {"role": "ours"}),
        ("lora_null compiled", layers.attach_ours, {"role": "ours", "only": _worth_compiling}),
        ("PEFT eager", layers.attach_peft, {"requires": ("peft",)}),
        ("PEFT compiled", layers.attach_peft, {"requires": ("peft",), "only": _worth_compiling}),
        ("accumulate", layers.attach_accumulated, {}),
        ("PEFT + our kernels", layers.attach_peft_fused, {"role": "ours", "requires": ("peft",)}),
        ("PEFT + Liger", layers.attach_peft, {"requires": ("peft", "liger_kernel"), "devices": ("cuda",)}),
        ("axolotl", layers.attach_axolotl, {"requires": ("peft", "axolotl"), "devices": ("cuda",)}),
        ("base alone", None, {"role": "floor"}),
    ]


def _worth_compiling(case) -> bool:
    # The cut 8B model exists for CPUs, where compiling it takes longer than all other providers together.
    return (case["model"], case.get("layers")) != ("llama-3-8b", 1)


def with_liger(model: nn.Module) -> nn.Module:
    """Let Liger's kernels compute norms, rotary embedding, SwiGLU and the loss of this instance only."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)
    return model
