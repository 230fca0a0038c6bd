"""The direct eigensolver for a range of eigenvectors, known in advance or chosen when all eigenvalues are known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Choose = Callable[[Tensor], tuple[int, int]]


def exact(C: Tensor, wanted: int | Choose, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Solve for eigenvalues of ``C`` and some eigenvectors, in float64.

    Args:
        C: ``(d, d)`` float64, symmetric.
        wanted: How many vectors of the smallest eigenvalues; or a function that is called with all eigenvalues
            ``(d,)``, ascending, on the host, and returns the range ``low, high`` of those whose vectors are wanted, or
            raises.
        overwrite: On the CPU work in the memory of ``C``, whose values are lost; else it is not modified.

    Returns:
        Eigenvalues on the host, ascending, and orthonormal vectors ``(d, high - low)`` on the device of ``C``, in the
        order of their eigenvalues. For a number the eigenvalues are those of the vectors, else all.
    """
    if C.device.type == "cpu" and len(C) > 1:
        return _by_range(C, wanted, overwrite)
    # Torch offers no partial solver on other devices.
    values, vectors = torch.linalg.eigh(C)
    values = values.cpu()
    if isinstance(wanted, int):
        return values[:wanted], vectors[:, :wanted].contiguous()
    low, high = wanted(values)
    return values, vectors[:, low:high].contiguous()


def _by_range(C: Tensor, wanted: int | Choose, overwrite: bool) -> tuple[Tensor, Tensor]:
    # LAPACK's syevr in its steps: one reduction serves the values, the choice and the vectors, of which no more are
    # computed than asked for.
    from scipy.linalg import LinAlgError, eigh_tridiagonal, eigvalsh_tridiagonal, lapack

    d = len(C)
    # The transpose of a row-major matrix is the column-major layout that LAPACK wants; C is symmetric.
    columns = C.contiguous().numpy().T
    reduced, diagonal, beside, tau, _ = lapack.dsytrd(
        columns if overwrite else columns.copy(order="F"),
        lower=1,
        lwork=int(lapack.dsytrd_lwork(d, lower=1)[0]),
        overwrite_a=1,
    )
    values = None
    if isinstance(wanted, int):
        # All eigenvalues would be a tenth of the time, at d = 2048 and r = 128.
        low, high = 0, wanted
    else:
        values = torch.from_numpy(eigvalsh_tridiagonal(diagonal, beside, lapack_driver="sterf"))
        low, high = wanted(values)
        if low >= high:
            return values, C.new_empty(d, 0)
    select = {"select": "i", "select_range": (low, high - 1)}
    try:
        found, vectors = eigh_tridiagonal(diagonal, beside, lapack_driver="stemr", **select)
    except LinAlgError:
        # stemr may give up; bisection with inverse iteration does not, but is quadratic in the size of a cluster.
        found, vectors = eigh_tridiagonal(diagonal, beside, lapack_driver="stebz", **select)
    # The reflectors lie below the diagonal: moved up a row within their memory, they are those of a QR factorisation.
    memory = reduced.reshape(-1, order="F")
    for j in range(d - 1):
        memory[j * (d - 1) : (j + 1) * (d - 1)] = memory[j * d + 1 : (j + 1) * d]
    reflectors = memory[: (d - 1) ** 2].reshape(d - 1, d - 1, order="F")
    # What is done with is dropped at once: at d = 14336 each of these is gigabytes.
    first, rest = vectors[:1].copy(), vectors[1:].copy(order="F")
    del vectors
    # 64: the largest block of LAPACK's ormqr.
    rest, _, _ = lapack.dormqr("L", "N", reflectors, tau, rest, lwork=64 * (high - low + 65), overwrite_c=1)
    del reduced, memory, reflectors
    V = torch.cat([torch.from_numpy(first), torch.from_numpy(rest)])
    del first, rest
    # stemr is orthonormal to 1e-13 at d = 320, and less so beyond; a step towards the polar factor squares that.
    V = torch.addmm(V, V, V.mT @ V, beta=1.5, alpha=-0.5)
    return torch.from_numpy(found) if values is None else values, V
