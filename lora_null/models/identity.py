"""Which weights a result belongs to, asked in two ways.

:func:`fingerprint` asks whether these are the pre-trained weights that covariances or an adapter were made for: a
sample of the adapted layers, blind to dtype, kept in files for good. Other weights are refused by
:func:`require_same`, rounded ones accepted with a warning.
:func:`weights_key` asks whether a calibration may go on from the sums of an interrupted one: all bits of the model,
dtype included, kept in its checkpoint only. There one changed bit must be seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..system.log import warn_once
from ..system.tensors import bytes_of
from .quantised import is_dense
from .weights import dense_weight, gathered, materialized

# Elements of each weight that enter the fingerprint: enough to tell two models apart, and 120 layers of a
# 135M model take 10 ms.
_SAMPLES = 64
# Of them in one dtype of 16 bits.
_BYTES = 2 * _SAMPLES


def fingerprint(linears: Mapping[str, nn.Linear]) -> str | None:
    """Hash names, shapes and a sample of the values of pre-trained weights, whatever dtype they were loaded in.

    Twice, with a slash in between: the values rounded to bf16, so that a bf16 checkpoint loaded in fp32 is the same
    model, and rounded to fp16, by which :func:`require_same` knows one that is loaded in that. Quantised weights have
    no values to compare: ``None``.
    """
    return fingerprint_of(sample_of(name, linear) for name, linear in linears.items())


def fingerprint_of(samples: Iterable[bytes | None]) -> str | None:
    """Return :func:`fingerprint` of the layers, in order, of which :func:`sample_of` gave these."""
    digest, in_half = hashlib.sha256(), hashlib.sha256()
    for sample in samples:
        if sample is None:
            return None
        digest.update(sample[:-_BYTES])
        in_half.update(sample[: -2 * _BYTES] + sample[-_BYTES:])
    return f"{digest.hexdigest()}/{in_half.hexdigest()}"


def sample_of(name: str, linear: nn.Linear) -> bytes | None:
    """Return what of a layer enters a fingerprint; ``None`` where the weight is quantised."""
    with materialized(linear):
        if not is_dense(linear):
            return None
        weight = dense_weight(linear)
        # Where it lies transposed, a flat form would be a copy.
        rows, columns = weight.shape
        places = torch.arange(0, rows * columns, max(1, rows * columns // _SAMPLES), device=weight.device)[:_SAMPLES]
        sample = weight[places // columns, places % columns].cpu()
    sample = nn.functional.pad(sample, (0, _SAMPLES - len(sample)))
    parts = (sample.to(dtype).view(torch.int16).numpy().tobytes() for dtype in (torch.bfloat16, torch.float16))
    return f"{name}:{(rows, columns)}".encode() + b"".join(parts)


def require_same(known: str | None, present: str | None, problem: str, remedy: str) -> None:
    """Refuse weights whose fingerprint is another one; a warning where the two agree in fp16.

    Args:
        known: As recorded; of sums of covariances, those of every text with `` + `` in between.
        present: Of the weights at hand.
        problem: What was made for other weights than which, and
        remedy: what to do then; both for the error.

    Raises:
        ValueError: Both are known, and the weights are no rounding of each other.
    """
    prints = (known or "").split(" + ")
    # Of sums, those of the last text are of the model that the others were learned in. Quantised ones have no print.
    if not present or not all(prints):
        return
    own, _, own_in_half = present.partition("/")
    if any(own == each.partition("/")[0] for each in prints):
        return
    if own_in_half and any(own_in_half == each.partition("/")[2] for each in prints):
        warn_once(
            "rounded-base",
            f"{problem}, but only by rounding: the two agree in float16. Errors of the size of that rounding follow.",
        )
        return
    raise ValueError(
        f"{problem}: the shapes agree, the values do not, and differ by more than a load in bfloat16, or in float16, "
        f"makes of them. {remedy}"
    )


# Width of the table over which the bits of a weight are summed, in 8-byte words.
_COLUMNS = 4096


def weights_key(model: nn.Module) -> str:
    """Hash every parameter and persistent buffer of ``model``: names, shapes, dtypes and all bits.

    The bits enter as row and column sums of wrapping 64-bit integers, formed where the tensor lies: exact, in
    any order, so that one changed bit changes the key and a swap of values does too. On a CPU this is 8 times faster
    than a cryptographic hash of all bytes (0.09 s against 0.7 s for 0.5 GB), and a GPU's weights stay there.
    It protects against mistakes, not against an adversary.
    """
    digest = hashlib.blake2b(digest_size=16)
    for prefix, module in model.named_modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        if not any(tensor is not None for _, tensor in own):
            continue
        # accelerate takes a second to import, and is needed only where it has put its hooks
        with materialized(module) if hasattr(module, "_hf_hook") else nullcontext():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None or name in module._non_persistent_buffers_set:
                    continue
                digest.update(f"{prefix}.{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
                _add_bits(digest, tensor)
    return digest.hexdigest()


def tensor_key(tensor: Tensor, *, sampled: bool = False) -> str:
    """Hash a floating-point tensor: dtype, shape and all bits, or with ``sampled`` those of a few values."""
    digest = hashlib.blake2b(digest_size=8)
    flat = tensor.detach().reshape(-1)
    _add_bits(digest, flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].contiguous() if sampled else flat)
    kind = str(tensor.dtype).removeprefix("torch.")
    shape = ",".join(map(str, tensor.shape))
    return f"{'sample ' if sampled else ''}{kind}:{shape}:{digest.hexdigest()}"


def digest_of(values: Iterable[str]) -> str:
    """Hash strings in order."""
    return hashlib.blake2b("\n".join(values).encode(), digest_size=16).hexdigest()


def _add_bits(digest, tensor: Tensor) -> None:
    tensor = gathered(tensor.detach())
    if tensor.is_meta:
        return
    # clone: a view of 8-byte words needs an aligned start
    flat = tensor.contiguous().view(-1)
    flat = flat.clone() if flat.storage_offset() else flat
    bits = flat.view(torch.uint8)
    words = bits[: bits.numel() // 8 * 8].view(torch.int64)
    table = words[: words.numel() // _COLUMNS * _COLUMNS].view(-1, _COLUMNS)
    for part in (table.sum(0), table.sum(1), words[table.numel() :], bits[words.numel() * 8 :]):
        # A copy: memory that numpy has seen can no longer be resized, as FSDP1 does.
        digest.update(bytes_of(part.to("cpu", copy=True)))
