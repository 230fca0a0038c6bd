"""Launch configurations and backend choices as data: a JSON file per architecture, tuned ones per card.

A file maps a kernel's name and the element size of its operands to a list of entries. An entry's ``when``
holds bounds on the sizes of a call (``d_max``, ``T_min``, ``r_max``, ...) and on ``fill``, the part of the device's
multiprocessors that its tiles keep at work: a wide tile asks less of the L2 cache, but there are fewer of them. The
first entry whose bounds all hold is used, and the last one has none. Nothing is tuned while a model trains: two ranks
that time the same kernels would choose differently, and their sums would differ in the last bits. ``lora-null tune``
measures and rewrites the data.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from ..system.environment import cache_folder
from ..system.files import replacing

__all__ = [
    "DyConfig",
    "LinearConfig",
    "OuterConfig",
    "ProjectConfig",
    "SyrkConfig",
    "architecture",
    "backend",
    "family",
    "forced",
    "launch_config",
    "matches",
    "nearest",
    "save_tuned",
    "shipped",
    "table",
    "tuned_path",
]

FOLDER = Path(__file__).parent / "configs"
_forced: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What an entry says of any kernel. ``BLOCK_*`` are sides of a tile; a rank below its side makes the tile smaller.

    ``SLICE_STEPS`` is what a slice of partial sums costs, in steps of the loop (:func:`runtime.splits_for`); ``TMA``
    means operands through tensor descriptors, in persistent programs, ``OCCUPANCY`` of them to a multiprocessor.
    """

    kernel: ClassVar[str]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class ProjectConfig(Config):
    """Of ``lora_kernels.project_kernel``."""

    kernel = "project"
    BLOCK_T: int
    BLOCK_N: int
    BLOCK_K: int
    SLICE_STEPS: int


@dataclass(frozen=True, kw_only=True)
class OuterConfig(Config):
    """Of ``lora_kernels.outer_kernel``."""

    kernel = "outer"
    BLOCK_T: int
    BLOCK_N: int
    BLOCK_R: int
    SLICE_STEPS: int


@dataclass(frozen=True, kw_only=True)
class DyConfig(Config):
    """Of ``lora_kernels.dy_kernel``: ``SLAB_BYTES`` of dy are found in the L2 cache by their second reader."""

    kernel = "dy"
    ROWS: int
    BLOCK_K: int
    BLOCK_T: int
    BLOCK_M: int
    BLOCK_R: int
    SLAB_BYTES: int
    SLICE_STEPS: int


@dataclass(frozen=True, kw_only=True)
class LinearConfig(Config):
    """Of ``lora_kernels.linear_kernel`` and ``linear_tma_kernel``, which walk the tiles in bands of ``GROUP``.

    ``ONE_LOOP``: the second one loads the next tile while it writes this one, where neither scaling nor dropout has
    to follow the low-rank product (size ``plain``: 1), and up to rank ``BLOCK_R``.
    """

    kernel = "linear"
    BLOCK_T: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    GROUP: int
    TMA: bool = False
    OCCUPANCY: int = 1
    ONE_LOOP: bool = False

    def tiles(self, *, T: int, m: int, **_: int) -> int:
        """Return how many tiles cover the output ``(T, m)``."""
        return cdiv(T, self.BLOCK_T) * cdiv(m, self.BLOCK_N)


@dataclass(frozen=True, kw_only=True)
class SyrkConfig(Config):
    """Of ``syrk_kernels.syrk_kernel`` and ``syrk_tma_kernel``; ``ATOMIC`` additions to C happen in the L2 cache."""

    kernel = "syrk"
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_T: int
    GROUP: int
    ATOMIC: bool
    SLICE_STEPS: int
    TMA: bool = False
    OCCUPANCY: int = 1

    def tiles(self, *, d: int, **_: int) -> int:
        """Return how many tiles cover the triangle of C ``(d, d)``."""
        side = max(self.BLOCK_M, self.BLOCK_N)
        rows = cdiv(d, side)
        return rows * (rows + 1) // 2 * (side // min(self.BLOCK_M, self.BLOCK_N))


C = TypeVar("C", bound=Config)


def architecture(device: torch.device | str) -> str:
    """Return the name under which the data of ``device`` is kept, card included: ``sm_90 NVIDIA H200``, or ``cpu``."""
    device = torch.device(device)
    if device.type != "cuda":
        return "cpu"
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _architecture(index: int) -> str:
    name = torch.cuda.get_device_name(index)
    if torch.version.hip:
        return f"{torch.cuda.get_device_properties(index).gcnArchName.split(':')[0]} {name}"
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor} {name}"


def family(arch: str) -> str:
    """Return the architecture without the card: ``sm_90`` or ``gfx942``."""
    return arch.partition(" ")[0]


def tuned_path(arch: str) -> Path:
    """Return where the tuning command keeps its result for ``arch``: below ``LORA_NULL_CACHE``."""
    return cache_folder() / "kernels" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', arch)}.json"


def _tuned(arch: str) -> Path | None:
    """Return the tuned data of this card, else those of another of its family: they differ in clocks and memory."""
    own = tuned_path(arch)
    others = sorted(own.parent.glob(f"{family(arch)}[_.]*json"))
    return own if own.exists() else others[0] if others else None


def _overlaid(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the lists of ``over`` in place of its own, per kernel or operation and element size."""
    result = {**base, **over}
    for section in ("dispatch", "kernels"):
        result[section] = dict(base[section])
        for name, lists in over.get(section, {}).items():
            both = isinstance(lists, dict) and name in base[section]
            result[section][name] = {**base[section][name], **lists} if both else lists
    return result


@cache
def shipped(arch: str) -> dict[str, Any]:
    """Return the table that comes with the package for ``arch``.

    What an architecture's own file leaves out is the default's. One without a file gets the table that
    :func:`nearest` names.
    """
    default = json.loads((FOLDER / "default.json").read_text())
    name = family(arch)
    known = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
    chosen = name if name in known else nearest(known, name, _shared_memory(name))
    return default if chosen == "default" else _overlaid(default, known[chosen])


def nearest(known: dict[str, dict[str, Any]], name: str, shared_memory: int) -> str:
    """Return which of the ``known`` tables suits an architecture without one, that has so many bytes a block.

    The one that uses the most of the shared memory: stages in flight and the size of a tile are bought with it. Of
    equals, the one whose number is nearest; one with tensor descriptors only from sm_90 on. Everything else, and what
    is not NVIDIA's, gets the default, which needs 64 KiB and no descriptors.
    """
    number = _number(name)

    def fits(other: str) -> bool:
        descriptors = any(
            entry.get("TMA") for lists in known[other]["kernels"].values() for entry in lists.get("16", [])
        )
        return known[other]["shared_memory"] <= shared_memory and (number >= 90 or not descriptors)

    others = [other for other in known if _number(other) and number and fits(other)]
    return max(others, key=lambda it: (known[it]["shared_memory"], -abs(_number(it) - number)), default="default")


def _number(name: str) -> int:
    return int(name.removeprefix("sm_")) if name.startswith("sm_") else 0


def _shared_memory(name: str) -> int:
    """Return the bytes of shared memory that a block may use on the device of that architecture; 0 without one."""
    for index in range(torch.cuda.device_count() if not torch.version.hip else 0):
        if family(architecture(f"cuda:{index}")) == name:
            return getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", 0)
    return 0


@cache
def table(arch: str) -> dict[str, Any]:
    """Return the data of ``arch``: the package's, overlaid with what the tuning commands measured here.

    Measured on this card, or else on another of its architecture: a guess that is better than none. Read once per
    process; ``save_tuned`` makes the next call read again.
    """
    path = _tuned(arch)
    return shipped(arch) if path is None else _overlaid(shipped(arch), json.loads(path.read_text()))


def save_tuned(arch: str, over: dict[str, Any]) -> Path:
    """Overlay the tuned data of ``arch`` with ``over``, a table like ``table``'s, and return the file's path."""
    path = tuned_path(arch)
    before = json.loads(path.read_text()) if path.exists() else {}
    data = _overlaid({"dispatch": {}, "kernels": {}, **before}, over)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
    table.cache_clear()
    return path


def cdiv(size: int, block: int) -> int:
    """Return the number of blocks that cover ``size``."""
    return -(-size // block)


@contextmanager
def forced(kernel: str, entry: dict[str, Any]) -> Iterator[None]:
    """Within this context give ``kernel`` this configuration whatever the sizes: for the tuning command."""
    _forced[kernel] = entry
    try:
        yield
    finally:
        del _forced[kernel]


def matches(entry: dict[str, Any], sizes: dict[str, int]) -> bool:
    """Say whether every bound in the entry's ``when`` holds; a size that is not given meets any bound."""
    for key, bound in entry.get("when", {}).items():
        name, _, kind = key.rpartition("_")
        size = sizes.get(name)
        if size is not None and (size > bound if kind == "max" else size < bound):
            return False
    return True


def _first(entries: Iterable[dict[str, Any]], sizes: dict[str, int]) -> dict[str, Any]:
    return next(entry for entry in entries if matches(entry, sizes))


def launch_config(
    kind: type[C], dtype: torch.dtype, arch: str, *, tma: bool = False, multiprocessors: int | None = None, **sizes: int
) -> C:
    """Return the configuration of the kernel of ``kind`` for operands of ``dtype`` and these sizes.

    Entries that use tensor descriptors (``TMA``) are passed over unless ``tma`` says that the operands allow it. Those
    that ask for a ``fill`` are judged by the ``multiprocessors`` that the device has.
    """
    entry = _forced.get(kind.kernel)
    if entry is None:
        bits = "32" if dtype.itemsize >= 4 else "16"
        usable = (
            entry
            for entry in table(arch)["kernels"][kind.kernel][bits]
            if (tma or not entry.get("TMA")) and _fills(kind, entry, multiprocessors, sizes)
        )
        entry = _first(usable, sizes)
    return _configured(kind, entry)


def _configured(kind: type[C], entry: dict[str, Any]) -> C:
    return kind(**{key: value for key, value in entry.items() if key != "when"})


def _fills(kind: Any, entry: dict[str, Any], multiprocessors: int | None, sizes: dict[str, int]) -> bool:
    """Say whether the tiles of an entry, computed wave by wave, keep as much of the device at work as it asks for."""
    least = entry.get("when", {}).get("fill_min")
    if least is None or multiprocessors is None:
        return True
    c = _configured(kind, entry)
    tiles, slots = c.tiles(**sizes), multiprocessors * c.OCCUPANCY
    return tiles >= least * cdiv(tiles, slots) * slots


def backend(operation: str, dtype: torch.dtype, arch: str, **sizes: int) -> str:
    """Return the implementation that the data of ``arch`` prefers for an operation of these sizes."""
    bits = "32" if dtype.itemsize >= 4 else "16"
    return _first(table(arch)["dispatch"][operation][bits], sizes)["backend"]
