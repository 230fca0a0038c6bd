"""LoRA-Null: adapters that start in the null space of a layer's activations, fast and exact.

The public names below load on first use, so that ``import lora_null`` costs next to nothing: transformers,
triton and peft are imported by the functions that need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Modules carry other names than the functions in them: importing a submodule binds it as an attribute of the
# package, which would otherwise hide the function.
_HOME = {
    "Covariances": "covariances",
    "LoraNullConfig": "config",
    "LoraNullLinear": "layers",
    "NullSpace": "solver",
    "calibrate": "calibration",
    "factorize": "factors",
    "initialize": "initialization",
    "load_adapter": "adapter",
    "merge": "adapter",
    "null_space": "solver",
    "null_spaces": "solver",
    "save_adapter": "adapter",
}
_MODULES = ("ops", "peft")

__all__ = [
    "Covariances",
    "LoraNullConfig",
    "LoraNullLinear",
    "NullSpace",
    "__version__",
    "calibrate",
    "factorize",
    "initialize",
    "load_adapter",
    "merge",
    "null_space",
    "null_spaces",
    "ops",
    "peft",
    "save_adapter",
]

if TYPE_CHECKING:
    from . import ops, peft
    from .adapter import load_adapter, merge, save_adapter
    from .calibration import calibrate
    from .config import LoraNullConfig
    from .covariances import Covariances
    from .factors import factorize
    from .initialization import initialize
    from .layers import LoraNullLinear
    from .solver import NullSpace, null_space, null_spaces


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    elif name in _MODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
