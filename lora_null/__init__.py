"""LoRA-Null: adapters that start in the null space of a layer's activations, fast and exact.

The public names below load on first use, so that ``import lora_null`` costs next to nothing: transformers,
triton and peft are imported by the functions that need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .system.version import __version__

# No subpackage bears the name of a function: importing it would bind it here as an attribute and hide the function.
_HOME = {
    "Covariances": "covariances",
    "LoraNullConfig": "config",
    "LoraNullLinear": "adapters",
    "NullBasis": "solver",
    "NullSpace": "solver",
    "RetentionCallback": "integrations",
    "calibrate": "calibration",
    "evaluate": "evaluation",
    "factorize": "solver",
    "initialize": "adapters",
    "initialize_streaming": "onepass",
    "load_adapter": "adapters",
    "memory_plan": "calibration",
    "merge": "adapters",
    "null_basis": "solver",
    "null_space": "solver",
    "null_spaces": "solver",
    "own_text": "calibration",
    "save_adapter": "adapters",
    "text_batches": "calibration",
}
_MODULES = ("bayes", "ops", "peft")

__all__ = [
    "Covariances",
    "LoraNullConfig",
    "LoraNullLinear",
    "NullBasis",
    "NullSpace",
    "RetentionCallback",
    "__version__",
    "bayes",
    "calibrate",
    "evaluate",
    "factorize",
    "initialize",
    "initialize_streaming",
    "load_adapter",
    "memory_plan",
    "merge",
    "null_basis",
    "null_space",
    "null_spaces",
    "ops",
    "own_text",
    "peft",
    "save_adapter",
    "text_batches",
]

if TYPE_CHECKING:
    from . import bayes, ops, peft
    from .adapters.initialize import initialize
    from .adapters.layer import LoraNullLinear
    from .adapters.load import load_adapter
    from .adapters.merge import merge
    from .adapters.save import save_adapter
    from .calibration.calibrate import calibrate
    from .calibration.memory_plan import memory_plan
    from .calibration.own_text import own_text
    from .calibration.texts import text_batches
    from .config import LoraNullConfig
    from .covariances import Covariances
    from .evaluation.evaluate import evaluate
    from .integrations.retention import RetentionCallback
    from .onepass.initialize import initialize_streaming
    from .solver.factorize import factorize
    from .solver.null_basis import NullBasis, null_basis
    from .solver.null_space import NullSpace, null_space
    from .solver.null_spaces import null_spaces


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
