"""How good a null space a covariance offers, and what an adapter does to the activations, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.files import Adapter
from ..covariances.covariances import Covariances
from ..models.identity import require_same

# Below this share of the largest eigenvalue the spectrum of an fp32 sum is rounding noise.
_NOISE = float(torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class LayerSpectrum:
    """The spectrum of one covariance ``C (d, d)``, read for adapters of rank ``r``.

    Attributes:
        name: Key of the sharing group.
        layers: How many linear layers read this input.
        d: Number of input features.
        tokens: Calibration tokens summed, those of the other text where they are fewer. Fewer than ``2 d`` leave the
            null space to chance.
        null_energy: Sum of the ``r`` smallest eigenvalues over the trace: the share of the activations' energy
            that an adapter of rank ``r`` sees at best. A random choice of directions sees ``r / d``.
        gap: Eigenvalue ``r + 1`` over eigenvalue ``r``, ascending; near 1 the cut is arbitrary. Inf where
            eigenvalue ``r`` is zero.
        effective_rank: ``exp`` of the entropy of the normalised singular values of the activations, which are
            the square roots of the eigenvalues (Roy and Vetterli, 2007).
        condition: Largest over smallest eigenvalue; inf where the smallest is not positive.
        knee: How many eigenvalues are below their mean: there the energy of the directions so far is furthest below
            their even share, the knee of that curve (Satopaa et al., 2011).
        against_energy: As ``null_energy``, of the same ``r`` directions on another text. None without one.
        generalisation: ``against_energy`` over the least that ``r`` directions can have there: 1 where both texts leave
            the same directions alone, more where they do not or chance decided. None without another text.
    """

    name: str
    layers: int
    d: int
    tokens: int
    null_energy: float
    gap: float
    effective_rank: float
    condition: float
    knee: int
    against_energy: float | None = None
    generalisation: float | None = None


def spectrum_report(
    covariances: Covariances, r: int, *, against: Covariances | None = None, progress: bool = True
) -> list[LayerSpectrum]:
    """Measure every covariance; the full spectrum in float64, one layer in memory at a time.

    Args:
        covariances: Those that the adapter starts from.
        r: The rank that the adapter will have.
        against: Those of the same layers on other text, such as the other half of it: how well the null spaces hold
            on what they were not computed from.
        progress: Show a progress bar.

    Raises:
        ValueError: ``r`` is not smaller than some ``d``, or ``against`` is of other layers, of another model or of
            the same text.
    """
    smallest = min(covariances, key=covariances.size)
    if not 1 <= r < covariances.size(smallest):
        raise ValueError(
            f"r is {r}; expected 1 <= r < {covariances.size(smallest)}, the number of input features of {smallest}. "
            "Pass the rank that the adapters will have."
        )
    if against is not None:
        _check_comparable(covariances, against)
    rows = []
    for key, C in tqdm(covariances.items(), "spectra", total=len(covariances), unit="matrix", disable=not progress):
        if against is None:
            rows.append(layer_spectrum(key, covariances, torch.linalg.eigvalsh(C.double()), r))
            continue
        eigenvalues, vectors = torch.linalg.eigh(C.double())
        row = layer_spectrum(key, covariances, eigenvalues, r)
        tokens = min(row.tokens, against.tokens[against.group_of(key)])
        caught, generalisation = _held(vectors[:, :r], against[key].double())
        rows.append(replace(row, tokens=tokens, against_energy=caught, generalisation=generalisation))
    return rows


def layer_spectrum(key: str, covariances: Covariances, eigenvalues: Tensor, r: int) -> LayerSpectrum:
    """Return the row of one group from its eigenvalues ``(d,)``, ascending, for ``r`` directions, ``1 <= r <= d``."""
    positive, d = eigenvalues.clamp(min=0), len(eigenvalues)
    return LayerSpectrum(
        name=key,
        layers=len(covariances.groups[key]),
        d=d,
        tokens=covariances.tokens[key],
        null_energy=_ratio(float(positive[:r].sum()), float(positive.sum())),
        gap=_ratio(float(positive[min(r, d - 1)]), float(positive[r - 1])),
        effective_rank=effective_rank(positive.sqrt()),
        condition=_ratio(float(positive[-1]), float(positive[0])),
        knee=int((positive < positive.mean()).sum()),
    )


def effective_rank(singular_values: Tensor) -> float:
    """Return ``exp(-sum p ln p)``, ``p`` the normalised ``singular_values (n,)``: ``n`` if all are equal, 1 if one."""
    p = singular_values / singular_values.sum()
    return float(torch.special.entr(p).sum().exp())


@dataclass(frozen=True)
class LayerUpdate:
    """The update ``dW = B A`` of one layer, as an adapter file holds it.

    Attributes:
        name: Name of the linear layer.
        d: Input features.
        m: Output features.
        r: Rank on disk.
        norm: Frobenius norm of ``dW``, scaling included.
        row_energy: ``tr(Q^T C Q)`` over the sum of the ``r`` smallest eigenvalues of ``C``, with ``Q (d, r)`` an
            orthonormal basis of the rows of ``A``: 1 in the null space, more elsewhere. None without covariances.
        response: ``tr(dW C dW^T) d / (|dW|^2 tr(C))``: how strongly the update answers to the calibration
            activations, compared with an update in random directions, which has about 1. None without
            covariances or for a zero update.
    """

    name: str
    d: int
    m: int
    r: int
    norm: float
    row_energy: float | None = None
    response: float | None = None


def adapter_report(
    path: str | os.PathLike,
    covariances: Covariances | None = None,
    *,
    eigenvalues: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], list[LayerUpdate]]:
    """Summarise an adapter folder; ``eigenvalues`` are those of :func:`eigenvalues_of`, where they are known already.

    Returns:
        ``(summary, layers)``; the summary holds the settings that readers of the adapter use.

    Raises:
        FileNotFoundError: ``path`` is not an adapter folder.
        ValueError: A file is damaged or of a newer format, or the covariances belong to another model.
    """
    adapter = Adapter.read(Path(path))
    factors, state = adapter.factors, adapter.state
    rows = []
    # Kept for each sharing group, whose layers are apart in the file: vectors are small, eigenproblems are not.
    known = dict(eigenvalues or {})
    if covariances is not None:
        require_fitting(factors, covariances)
    for name, (lora_A, lora_B) in tqdm(factors.items(), "updates", unit="layer", disable=not progress):
        factor_A, factor_B = lora_A.double(), adapter.scaling_of(name) * lora_B.double()
        if covariances is None:
            rows.append(_measure(name, factor_A, factor_B))
            continue
        C = covariances[name].double()
        key = covariances.group_of(name)
        if key not in known:
            known[key] = torch.linalg.eigvalsh(C)
        rows.append(_measure(name, factor_A, factor_B, C, known[key]))
    summary = {
        "base_model_name_or_path": adapter.base_model,
        "r": adapter.r,
        "lora_alpha": adapter.recipe and adapter.recipe.lora_alpha,
        "target_modules": adapter.target_modules,
        "layers": len(factors),
        "parameters": sum(a.numel() + b.numel() for a, b in factors.values()),
        "dtype": str(next(iter(factors.values()))[0].dtype).removeprefix("torch."),
        "train": state.config.train if state else None,
        "written_by": f"lora_null {state.version}" if state else None,
    }
    return summary, rows


def eigenvalues_of(
    covariances: Covariances, keys: Iterable[str] | None = None, *, progress: bool = True
) -> dict[str, Tensor]:
    """Return the eigenvalues ``(d,)`` of each covariance, or of some groups, ascending, by group, in float64.

    Computed by LAPACK, without this package's solver: they are what that solver is judged by.
    """
    chosen = list(covariances if keys is None else keys)
    bar = tqdm(chosen, "eigenvalues", unit="matrix", disable=not progress)
    return {key: torch.linalg.eigvalsh(covariances[key].double()) for key in bar}


def row_space_energy(lora_A: Tensor, C: Tensor, eigenvalues: Tensor | None = None) -> float:
    """Return ``tr(Q^T C Q)`` over its minimum, ``Q`` an orthonormal basis of the rows of ``lora_A (r, d)``.

    ``eigenvalues (d,)`` are those of ``C (d, d)``, ascending, if they are known already. The minimum over all
    subspaces of that dimension is the sum of the smallest eigenvalues (Ky Fan). Inf if the minimum is below the
    rounding of ``C`` in float32 and the subspace is not.
    """
    Q = _row_basis(lora_A.detach().to(C.device, torch.float64))
    eigenvalues = torch.linalg.eigvalsh(C.double()) if eigenvalues is None else eigenvalues
    least = float(eigenvalues[: Q.shape[1]].clamp(min=0).sum())
    floor = _NOISE * float(eigenvalues[-1])
    caught = float((Q * (C.double() @ Q)).sum())
    return 1.0 if max(caught, least) <= floor else _ratio(caught, least)


def row_space_energies(
    factors: Mapping[str, Tensor], covariances: Covariances, eigenvalues: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return :func:`row_space_energy` of each ``lora_A (r, d)`` by layer; see :func:`eigenvalues_of`."""
    return {
        name: row_space_energy(lora_A, covariances[name], eigenvalues[covariances.group_of(name)])
        for name, lora_A in factors.items()
    }


def rows_as_dicts(rows: list[LayerSpectrum] | list[LayerUpdate]) -> Iterator[dict[str, Any]]:
    """Return rows as plain values that JSON can hold; infinite ratios become None."""
    for row in rows:
        yield {key: None if value == float("inf") else value for key, value in asdict(row).items()}


def response(lora_A: Tensor, lora_B: Tensor, C: Tensor) -> float | None:
    """Return ``tr(dW C dW^T) d / (|dW|^2 tr(C))`` of ``dW = B A``, see :attr:`LayerUpdate.response`.

    Args:
        lora_A: ``(r, d)``.
        lora_B: ``(m, r)``.
        C: ``(d, d)``, the covariance of the layer's input.
    """
    C = C.double()
    lora_A, lora_B = (factor.detach().to(C.device, torch.float64) for factor in (lora_A, lora_B))
    gram_B = lora_B.T @ lora_B
    norm_squared, trace = float((gram_B * (lora_A @ lora_A.T)).sum()), float(C.trace())
    if norm_squared <= 0 or trace <= 0:
        return None
    return float((gram_B * (lora_A @ C @ lora_A.T)).sum()) * C.shape[0] / (norm_squared * trace)


def _held(U: Tensor, C: Tensor) -> tuple[float, float]:
    """Return what the directions ``U (d, r)`` catch of ``C (d, d)``, over its trace and over the optimum."""
    caught = max(0.0, float((U * (C @ U)).sum()))
    return _ratio(caught, float(C.trace())), row_space_energy(U.T, C)


def _check_comparable(covariances: Covariances, against: Covariances) -> None:
    """Refuse covariances whose comparison would say nothing, before any spectrum is computed."""
    covariances + against  # refuses other layers and sizes, and adds no matrix before one is asked for
    require_same(
        covariances.metadata.get("base_fingerprint"),
        against.metadata.get("base_fingerprint"),
        "against was collected on a model with other weights in these layers than the covariances",
        "Calibrate both halves of the text on one model.",
    )
    data = [each.metadata.get("data") for each in (covariances, against)]
    if data[0] and data[0] == data[1]:
        raise ValueError(
            "against is of the same text as the covariances, so that it agrees whatever they are worth; expected "
            "another half of the text. Calibrate on each half and pass both."
        )


def _row_basis(lora_A: Tensor) -> Tensor:
    # The export of a trained A stacks [A ; A - A0]: its rows may be dependent, so the rank is found, not assumed.
    _, singular_values, rows = torch.linalg.svd(lora_A, full_matrices=False)
    kept = singular_values > singular_values[0] * max(lora_A.shape) * _NOISE
    return rows[kept].T


def require_fitting(factors: Mapping[str, tuple[Tensor, Tensor]], covariances: Covariances) -> None:
    """Refuse covariances without an entry of the right size for every layer of ``factors``; reads no matrix.

    Raises:
        ValueError: Names the first layer that has none.
    """
    for name, (lora_A, _) in factors.items():
        if name not in covariances or covariances.size(name) != lora_A.shape[1]:
            found = f"d={covariances.size(name)}" if name in covariances else "no entry"
            raise ValueError(
                f"The adapter's layer {name} reads d={lora_A.shape[1]} features, but the covariances hold {found} for "
                "it. They were collected on another model or for fewer target_modules."
            )


def _measure(
    name: str, lora_A: Tensor, lora_B: Tensor, C: Tensor | None = None, eigenvalues: Tensor | None = None
) -> LayerUpdate:
    (r, d), m = lora_A.shape, lora_B.shape[0]
    norm = max(0.0, float(((lora_B.T @ lora_B) * (lora_A @ lora_A.T)).sum())) ** 0.5
    if C is None:
        return LayerUpdate(name, d, m, r, norm)
    return LayerUpdate(name, d, m, r, norm, row_space_energy(lora_A, C, eigenvalues), response(lora_A, lora_B, C))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("inf")
