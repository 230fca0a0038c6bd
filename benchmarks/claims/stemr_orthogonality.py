"""How orthonormal the eigenvectors of LAPACK's stemr are."""

import torch

from . import Found

SOURCE = "lora_null/solver/exact.py"
QUOTE = "stemr is orthonormal to 1e-13 at d = 320, and less so beyond"
TIMED = False


def measure() -> Found:
    """Solve tridiagonal forms of covariances with a real spectrum."""
    from scipy.linalg import eigh_tridiagonal, hessenberg

    from .. import spectra

    found = {}
    for d in (320, 640, 1280):
        T = hessenberg(spectra.covariance(d, "o")[0].numpy())
        _, vectors = eigh_tridiagonal(T.diagonal(), T.diagonal(1), lapack_driver="stemr")
        V = torch.from_numpy(vectors)
        found[f"d = {d}"] = (1e-13, float((V.T @ V - torch.eye(d, dtype=V.dtype)).abs().max()))
    return found
