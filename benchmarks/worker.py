"""The process behind ``--compare``: one source tree's library under this suite, driven over pipes.

Requests and answers are JSON lines. ``{"open": {"question", "case"}}`` sets our provider up and verifies it;
``{"sample": mode}`` returns one time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


class TreeFinder(MetaPathFinder):
    """Finds ``lora_null`` in a source tree, ahead of an installed one.

    ``lora_null.kernels`` and ``lora_null.csrc`` lie elsewhere in the tree than their names say; an installation maps
    them, a plain path cannot.
    """

    def __init__(self, tree: Path):
        self._folders = {
            "lora_null": tree / "lora_null",
            "lora_null.kernels": tree / "kernels" / "gpu",
            "lora_null.csrc": tree / "csrc",
        }

    def find_spec(self, fullname, path=None, target=None):
        """Return the spec of a module of the tree; ``None`` for names of other projects.

        Raises:
            ModuleNotFoundError: The tree has no such module. An installed one of that name would be measured in its
                place: another commit's.
        """
        if fullname.partition(".")[0] != "lora_null":
            return None
        folder = self._folders.get(fullname)
        if folder is None or not folder.is_dir():
            if (spec := PathFinder.find_spec(fullname, path)) is None:
                raise ModuleNotFoundError(
                    f"{self._folders['lora_null'].parent} has no module {fullname}", name=fullname
                )
            return spec
        init = folder / "__init__.py"
        if not init.exists():
            spec = importlib.util.spec_from_loader(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            return spec
        return importlib.util.spec_from_file_location(fullname, init, submodule_search_locations=[str(folder)])


def serve(device: str, requests, answer) -> None:
    """Answer requests until they end."""
    from . import timing
    from .harness import Case
    from .questions import registry

    timing.keep_freed_memory()
    questions, clock = registry(), timing.clock(device)
    call: Any = None
    for line in requests:
        request = json.loads(line)
        if "sample" in request:
            answer({"ms": clock.sample(call.modes[request["sample"]])})
            continue
        call = None
        question, case = questions[request["open"]["question"]], Case(request["open"]["case"])
        provider = next(p for p in question.providers() if p.role == "ours")
        try:
            inputs = question.setup(case, device)
            call = provider.build(case, inputs)
            found = question.verify(case, inputs, call.output())
            if found.refuses(provider.allowance):
                raise ValueError(f"wrong: {found.measure} is {found.error:.3g}, at most {found.tolerance:.3g}")
            for timed in call.modes.values():
                timed()
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"[:500]})
            continue
        answer({"modes": list(call.modes)})


def main() -> None:
    """Serve on the standard streams; whatever else is printed goes to the error stream."""
    tree, device = Path(sys.argv[1]).resolve(), sys.argv[2]
    sys.meta_path.insert(0, TreeFinder(tree))
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict) -> None:
        pipe.write(json.dumps(value) + "\n")
        pipe.flush()

    import lora_null

    if not Path(lora_null.__file__).is_relative_to(tree):
        raise RuntimeError(f"lora_null came from {lora_null.__file__}, not from {tree}.")
    serve(device, sys.stdin, answer)


if __name__ == "__main__":
    main()
