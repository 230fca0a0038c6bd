"""How near our null spaces come to the optimum on a real model: ``python -m benchmarks.energy MODEL DATA``.

The covariances are summed twice over the same tokens, in fp32 as usual and in fp64. The bases come from the first, the
optimum and the energy of the bases from the second, so that an error of the sums and one of the solver count alike.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_null
from lora_null.calibration.sources import read_texts
from lora_null.calibration.texts import token_batches

from . import spectra


def excesses(exact: lora_null.Covariances, summed: lora_null.Covariances, ranks: list[int]) -> dict[int, dict]:
    """Return, by rank and group, the energy of our basis over the sum of the least eigenvalues, less one."""
    found: dict[int, dict[str, float]] = {r: {} for r in ranks}
    for key, C in exact.items():
        optimum = torch.linalg.eigvalsh(C).cumsum(0)
        for r in ranks:
            found[r][key] = spectra.energy(C, lora_null.null_space(summed[key], r).basis) / float(optimum[r - 1]) - 1
    return found


def main() -> None:
    """Print median and worst excess of each rank."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.energy", description=__doc__)
    parser.add_argument("model", help="folder or name of a causal language model")
    parser.add_argument("data", help="text, or .jsonl")
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--r", type=int, nargs="+", default=[16, 32, 64, 128])
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    batches = token_batches(tokenizer, read_texts(arguments.data), max_tokens=arguments.tokens)
    summed, exact = (lora_null.calibrate(model, batches, accumulate=how) for how in ("fp32", "fp64"))
    print(f"{max(summed.tokens.values())} tokens, {len(summed)} inputs, {arguments.dtype}, torch {torch.__version__}")
    print(f"{'r':>4}  {'median':>9}  {'worst':>9}  {'second':>9}  worst input")
    for r, values in excesses(exact, summed, arguments.r).items():
        *_, second, worst = sorted(values, key=values.__getitem__)
        middle = statistics.median(values.values())
        print(f"{r:>4}  {middle:9.1e}  {values[worst]:9.1e}  {values[second]:9.1e}  {worst}")


if __name__ == "__main__":
    main()
