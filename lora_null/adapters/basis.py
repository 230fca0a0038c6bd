"""A down-projection factor that stays in given directions while it learns: ``A = C N^T``, C trained."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..models.weights import gathered
from ..ops.reference import full_precision
from ..solver.null_basis import NullBasis
from ..solver.pooling import pool, spread

# A factor may lie outside the free directions by this part of its length: a few roundings of bf16. One of another layer
# or of other covariances is outside by about (d - k) / d.
_MAX_OUTSIDE = 2.0**-6


class FreeDirections:
    """The free directions of one sharing group, one object for all its layers.

    Held are the ``k`` directions ``N (d, k)`` or the others ``P (d, d - k)``, whichever are fewer. It is no module and
    has no buffers: DDP would broadcast those at every forward. It follows the device of the factors that use it.

    Where A reads the means of groups of ``L`` inputs, all this is of the pooled inputs: ``d`` is their number, and a
    group's entries of the whole A are equal.

    Attributes:
        k: How many directions are free.
        held: ``N`` or ``P``.
        complementary: Whether ``held`` is ``P``.
        group_pooling: ``L``, or ``None``.
    """

    def __init__(self, free: NullBasis, *, dtype: torch.dtype = torch.float32, group_pooling: int | None = None):
        """Take the vectors of ``free`` in ``dtype``.

        bf16 halves the memory, and puts about ``2^-9`` of A's length into the protected directions; fp32 ``6e-8``.
        :meth:`lora_null.NullBasis.leak` measures it.
        """
        held = free.basis if free.complement is None else free.complement
        assert held is not None
        self.k, self.complementary = free.k, free.complement is not None
        self.held = held.to(dtype).contiguous()
        self.group_pooling = group_pooling

    @property
    def width(self) -> int:
        """Number of inputs of A."""
        return self.held.shape[0] * (self.group_pooling or 1)

    def coordinates(self, A: Tensor) -> Tensor:
        """Return ``A N (r, k)``, or ``A - (A P) P^T (r, d)`` where the complement is held; the adjoint of expand."""
        A = A if self.group_pooling is None else pool(A, self.group_pooling)
        return self._product(A, lambda wide, held: wide @ held)

    def expand(self, C: Tensor) -> Tensor:
        """Return ``C N^T (r, d)`` from ``C (r, k)``, or ``C - (C P) P^T`` from ``C (r, d)``."""
        A = self._product(C, lambda wide, held: wide @ held.mT)
        return A if self.group_pooling is None else spread(A, self.group_pooling)

    def _product(self, M: Tensor, multiply: Any) -> Tensor:
        # At least in fp32, whatever autocast or TF32 would make of it: what they round off is read with the energy of
        # the protected directions. A compiler sees plain products, where TF32 is the user's choice.
        precise = nullcontext() if torch.compiler.is_compiling() else full_precision()
        kind = M.device.type
        plain = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with precise, plain:
            dtype = torch.promote_types(M.dtype, torch.promote_types(self.held.dtype, torch.float32))
            wide, held = M.to(dtype), self._on(M.device).to(dtype)
            result = wide - (wide @ held) @ held.mT if self.complementary else multiply(wide, held)
            return result.to(M.dtype)

    def _on(self, device: torch.device) -> Tensor:
        if self.held.device == device:
            return self.held
        moved = self.held.to(device)
        if device.type != "meta":
            self.held = moved
        return moved


class _Made(NamedTuple):
    state: tuple
    values: Tensor | None
    A: Tensor


# On the layers of a llama-3.2-1b block, fp32 on a CPU (benchmarks/claims/basis_step.py): a step of 1.03 times one in
# which A is a parameter at 512 tokens with one thread (down alone: 1.10), 1.06 with two; of 1.01 at 2048.
class BasisFactor(nn.Module):
    """``A = C N^T (r, d)`` as ``weight``, in place of a factor that is a parameter; trained is ``coefficients``.

    ``coefficients`` is ``C (r, k)``, or ``A' (r, d)`` with ``A = A' - (A' P) P^T`` where the complement is held: the
    same functions, another path of the optimiser. A is made once per value of the coefficients, so once per optimiser
    step, and serves all micro-batches and the recomputation of checkpointed blocks; its gradient goes back by
    ``dC = dA N``, in fp32 or wider. ``requires_grad`` of ``weight`` is that of the coefficients. Compiled, and under
    torch.func, A is made by plain operations at every call.

    The state dict has A as ``weight`` beside the ``coefficients``: what reads a factor needs no directions, and where
    those were solved again with other signs, or turned within a cluster of eigenvalues, it is A that counts. A alone is
    enough to load. Where the coefficients are sharded, ``weight`` and the state dict take all processes.

    Attributes:
        coefficients: What is trained, in the dtype of the start.
        directions: The free directions, shared by a group.
    """

    def __init__(self, start: Tensor, directions: FreeDirections, *, trainable: bool = True):
        """Begin at ``start (r, d)``, as :func:`lora_null.factorize` returns ``A0``.

        Raises:
            ValueError: ``start`` has another width, or lies outside the free directions.
        """
        nn.Module.__init__(self)
        self.directions = directions
        self.coefficients = nn.Parameter(self._coordinates(start), requires_grad=trainable)
        self._made: _Made | None = None

    def put(self, A: Tensor) -> None:
        """Set the coefficients to those of ``A (r, d)``; the errors are the constructor's, and change nothing."""
        found = self._coordinates(A)
        if found.shape != self.coefficients.shape:
            raise ValueError(
                f"The factor has shape {tuple(A.shape)}; expected {len(self.coefficients)} rows, the adapter's rank. "
                "Was it trained with another rank?"
            )
        with torch.no_grad():
            self.coefficients.copy_(found)

    @property
    def weight(self) -> Tensor:
        """``A (r, d)``, with a gradient to the coefficients where they are trained and gradients are on."""
        C = self.coefficients
        if hasattr(C, "full_tensor"):
            return self._of_shards(C)
        if C.dim() != 2:
            # Outside a forward: ZeRO-3 can gather; of what FSDP1 leaves whoever needs a matrix says that it is none.
            whole = gathered(C)
            return C if whole is C else self.directions.expand(whole)
        # torch.func and DataParallel put tensors of the moment in the parameter's place.
        if torch.compiler.is_compiling() or not isinstance(C, nn.Parameter):
            return self.directions.expand(C)
        A = self._current(C)
        return _Expanded.apply(C, A, self.directions) if C.requires_grad and torch.is_grad_enabled() else A

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (..., d)`` to ``x A^T (..., r)``, as the linear layer that PEFT has here."""
        return nn.functional.linear(x, self.weight)

    def extra_repr(self) -> str:
        """Show the sizes."""
        r, d, k = len(self.coefficients), self.directions.width, self.directions.k
        form = "complement" if self.directions.complementary else "basis"
        return f"({r}, {d}) in {k} free directions, {form} in {self.directions.held.dtype}"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make A again."""
        return {**self.__dict__, "_made": None}

    @torch.no_grad()
    def _coordinates(self, A: Tensor) -> Tensor:
        d = self.directions.width
        if A.dim() != 2 or A.shape[1] != d:
            raise ValueError(
                f"The factor has shape {tuple(A.shape)}; expected (r, {d}), the width of the free directions. Were "
                "they solved from another layer's covariance?"
            )
        found = self.directions.coordinates(A.detach())
        outside, length = float((A.detach() - self.directions.expand(found)).norm()), float(A.detach().norm())
        if not outside <= _MAX_OUTSIDE * length:
            raise ValueError(
                f"The factor lies outside the {self.directions.k} free directions by {outside / length:.2g} of its "
                f"length; expected at most {_MAX_OUTSIDE:.2g}. Is it of another model, from other covariances or "
                "with more directions free? Use those it was made with, or train it freely (train='ab')."
            )
        return found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # FSDP1 and ZeRO-3 leave a flat part of the coefficients here, of which nothing can be made.
        if self.coefficients.dim() == 2:
            destination[prefix + "weight"] = self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        kept = dict(state_dict)
        A, C = kept.pop(prefix + "weight", None), kept.get(prefix + "coefficients")
        if A is not None and not hasattr(self.coefficients, "full_tensor"):
            try:
                if C is None or not self._makes(C, A):
                    kept[prefix + "coefficients"] = self._coordinates(A)
            except ValueError as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
                return
        rest = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(kept, prefix, *rest)

    @torch.no_grad()
    def _makes(self, C: Tensor, A: Tensor) -> bool:
        if C.shape != self.coefficients.shape or C.dtype != A.dtype:
            return False
        off = (self.directions.expand(C) - A).norm()
        return bool(off <= min(16 * torch.finfo(A.dtype).eps, _MAX_OUTSIDE) * A.norm())

    @torch.no_grad()
    def _of_shards(self, C: Any) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        A = self.directions.expand(C.full_tensor())
        return DTensor.from_local(A, C.device_mesh, [Replicate()] * C.device_mesh.ndim, run_check=False)

    def _current(self, C: Tensor) -> Tensor:
        state: tuple = (C.device, C.dtype, C.shape)
        # Comparing values costs 1 / 2d of the product and sees every way of writing, .data and FSDP's included.
        if not (compared := C.device.type == "cpu"):
            # Here it would make the host wait. Optimizers may write through .data, which torch does not count.
            state += (C.data_ptr(), 0 if C.is_inference() else C._version, _Steps.count)
        made = self._made
        if made is None or made.state != state or not (made.values is None or torch.equal(made.values, C)):
            # Not an inference tensor, so that training may go on with it.
            with torch.inference_mode(False), torch.no_grad():
                values = C.detach().clone() if compared else None
                self._made = made = _Made(state, values, self.directions.expand(C.detach()))
        return made.A


def factor_within(
    name: str, start: Tensor, directions: FreeDirections, kind: type[BasisFactor] | None = None
) -> BasisFactor:
    """Make a :class:`BasisFactor`, or one of its ``kind``, with the name of the layer in its errors."""
    try:
        return (kind or BasisFactor)(start, directions)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class _Expanded(torch.autograd.Function):
    """A, made already, as a function of C."""

    generate_vmap_rule = True

    @staticmethod
    def forward(C: Tensor, A: Tensor, directions: FreeDirections) -> Tensor:
        return A.view_as(A)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, FreeDirections], output: Tensor) -> None:
        ctx.directions = inputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dA: Tensor) -> tuple[Tensor, None, None]:
        return ctx.directions.coordinates(dA), None, None


class _Steps:
    """Counts the steps of every torch optimizer of the process."""

    count = 0


def _count(*_: Any) -> None:
    _Steps.count += 1


register_optimizer_step_post_hook(_count)
