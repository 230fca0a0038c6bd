"""Runs the claims named on the command line, or all: what is claimed, what is measured here."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from pathlib import Path

import torch

NAMES = [found.name for found in pkgutil.iter_modules([str(Path(__file__).parent)]) if found.name != "__main__"]


def main() -> None:
    """Print one line per number."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--no-times", action="store_true", help="only what does not depend on the machine's speed")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"there is no claim {', '.join(sorted(unknown))}; known are: {', '.join(NAMES)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in arguments.names or NAMES:
        claim = importlib.import_module(f"{__package__}.{name}")
        if arguments.no_times and claim.TIMED:
            continue
        print(f"{name}: {claim.SOURCE}: {claim.QUOTE!r}")
        for what, (claimed, measured) in claim.measure().items():
            print(f"    {what:50} claimed {claimed:9.3g}   measured {measured:9.3g}", flush=True)


if __name__ == "__main__":
    main()
