"""The commands that read a model, covariances or an adapter and write another: calibrate, add, export, merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import LoraNullConfig
from ..models.settings import Loading
from ..system.files import require_writable
from .options import (
    AsJson,
    Data,
    Model,
    Overwrite,
    Progress,
    Seed,
    Targets,
    VerifyBase,
    Weights,
    help_of,
    parse_names,
    parse_targets,
)
from .processes import joined
from .reading import Text, parse_weights


def calibrate(
    model: Model,
    data: Data = None,
    generate: Annotated[int | None, typer.Option(help="Tokens that the model writes itself.")] = None,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("covariances.safetensors"),
    weights: Weights = None,
    field: Annotated[str | None, typer.Option(help="Of the objects or rows; default: text, ...")] = None,
    roles: Annotated[str | None, typer.Option(help="Of messages that count, such as assistant.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of each text.", show_default="65536")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Longer is cut.", show_default="512, written 128")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Documents at a time.", show_default="16, written 32")] = None,
    target_modules: Targets = "all-linear",
    target_parameters: Annotated[str | None, typer.Option(help=help_of(LoraNullConfig, "target_parameters"))] = None,
    mask: Annotated[str, typer.Option(help="What counts: attention, none.")] = "attention",
    accumulate: Annotated[str, typer.Option(help="Sums in fp32 or fp64.")] = "fp32",
    checkpoint: Annotated[Path | None, typer.Option(help="File of sums in progress, to go on from.")] = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="One decoder layer at a time.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print memory, tokens, time and size.")] = False,
    *,
    loading: Loading,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: AsJson = False,
    progress: Progress = True,
) -> None:
    """Sum the activation covariances of a model over calibration text.

    Example: lora-null calibrate MODEL --data text.jsonl --output c.safetensors
    """
    from ..calibration.calibrate import calibrate as run
    from ..calibration.estimate import estimate
    from ..calibration.options import Options
    from ..calibration.texts import labelled
    from ..models.loading import load_tokenizer, load_weights
    from ..models.parts import is_encoder_decoder
    from ..system.distributed import in_first_process
    from .output import covariance_facts, print_result

    text = Text(data or (), generate, weights, field, roles, max_tokens, sequence_length, batch_size, mask)
    if not text.sources:
        raise ValueError(
            "calibrate has no text; expected --data FILE with text like what must not be forgotten, --generate TOKENS, "
            "which the model writes itself, or both."
        )
    _check_outputs(output, checkpoint, text.data, overwrite)
    options: dict[str, Any] = dict(
        mask=text.counted, accumulate=accumulate, checkpoint=checkpoint, low_memory=low_memory
    )
    checked = Options(**options)
    parameters = parse_names(target_parameters)
    config = LoraNullConfig(target_modules=parse_targets(target_modules), target_parameters=parameters, seed=seed)
    tokenizer = load_tokenizer(model, loading)
    batches = text.read(tokenizer, seed)
    loaded = load_weights(model, loading)
    two_sided = is_encoder_decoder(loaded)
    if two_sided and roles is not None:
        raise ValueError(f"roles is {roles!r}, and {model} has an encoder, which reads all of them. Leave roles out.")
    batches += text.written(loaded, tokenizer, seed, progress=progress, dry_run=dry_run)
    if two_sided or roles is not None:
        batches = labelled(batches)
    if dry_run:
        found = estimate(loaded, batches, config, checked)
        print_result(str(found), asdict(found), as_json=json)
        return
    with joined() as first:
        covariances = run(loaded, batches, config, **options, progress=progress)
        in_first_process(lambda: covariances.save(output, overwrite=overwrite))
    if not first:
        return
    said = f"{output}: {covariances!r}, from {' and '.join(text.sources)}"
    if generate is None:
        said += ". What is in no text is not protected: --generate 16384 adds text that the model writes."
    print_result(said, {**covariance_facts(output, covariances), "texts": text.sources}, as_json=json)


def add(
    files: Annotated[list[Path], typer.Argument(help="Files of calibrate, of one model.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Covariance file to write.")] = Path("covariances.safetensors"),
    weights: Weights = None,
    overwrite: Overwrite = False,
    json: AsJson = False,
) -> None:
    """Add covariances of several texts, so that an adapter leaves all of them alone.

    Example: lora-null add a.safetensors b.safetensors --weights 1,0.5
    """
    from ..calibration.texts import check_weights
    from ..covariances.covariances import Covariances, check_target
    from .output import covariance_facts, print_result

    numbers = parse_weights(weights)
    check_weights(numbers, len(files))
    require_writable(output)
    check_target(output, overwrite)
    if output.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"output is {output}, one of the files to add. Name another file.")
    loaded = [Covariances.load(file) for file in files]
    total, *others = loaded if numbers is None else map(Covariances.weighted, loaded, numbers)
    for covariances in others:
        total = total + covariances
    total.save(output, overwrite=overwrite)
    print_result(f"{output}: {total!r}", covariance_facts(output, total), as_json=json)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Adapter or Trainer checkpoint folder.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder of the plain adapter to write.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="On disk: float32, bfloat16 or float16.")] = "float32",
    lora_alpha: Annotated[
        float | None, typer.Option(help="Of the run, where the checkpoint does not say it; default r.")
    ] = None,
    base_model_name_or_path: Annotated[
        str | None, typer.Option(help="Written into the adapter; default: as in the checkpoint.")
    ] = None,
    overwrite: Overwrite = False,
    json: AsJson = False,
) -> None:
    """Convert a checkpoint to a plain LoRA adapter: one rank, lora_alpha = r, no scaling left.

    Example: lora-null export CHECKPOINT adapter --dtype bfloat16
    """
    from ..adapters.export import export_adapter
    from ..adapters.files import check_target
    from ..models.loading import parse_dtype
    from .output import print_result

    require_writable(output)
    check_target(output, overwrite)
    r = export_adapter(
        checkpoint,
        output,
        dtype=parse_dtype(dtype),
        lora_alpha=lora_alpha,
        base_model_name_or_path=base_model_name_or_path,
        overwrite=overwrite,
    )
    print_result(f"{output}: plain LoRA adapter of rank {r}.", {"output": str(output), "r": r}, as_json=json)


def merge(
    model: Model,
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Model folder to write.", show_default=False)],
    pooling: Annotated[
        str | None, typer.Option(help="Of QA-LoRA whose configuration does not say it: mean, sum or peft.")
    ] = None,
    *,
    loading: Loading,
    verify_base: VerifyBase = True,
    overwrite: Overwrite = False,
    json: AsJson = False,
) -> None:
    """Fold an adapter into its base model and write a plain Hugging Face checkpoint.

    Example: lora-null merge MODEL adapter merged
    """
    from ..adapters.load import load_adapter
    from ..adapters.merge import check_merge_target, save_merged
    from ..adapters.merge import merge as fold
    from ..models.loading import load_model, load_tokenizer, processor_files
    from .output import print_result

    require_writable(output)
    check_merge_target(output, overwrite=overwrite, inputs=(model, adapter), tokenizer=load_tokenizer(model, loading))
    loaded, tokenizer = load_model(model, loading)
    folded = fold(load_adapter(loaded, adapter, verify_base=verify_base, pooling=pooling))
    save_merged(folded, tokenizer, output, beside=processor_files(model, loading), overwrite=overwrite)
    print_result(f"{output}: merged model.", {"output": str(output)}, as_json=json)


def _check_outputs(output: Path, checkpoint: Path | None, data: Sequence[Path], overwrite: bool) -> None:
    """Refuse before any work is done what ``calibrate`` cannot write, or may not."""
    from ..calibration.checkpoint import check_checkpoint
    from ..covariances.covariances import check_target

    require_writable(output)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; expected the name of the covariance file to write.")
    if output.resolve() in [text.resolve() for text in data]:
        raise ValueError(f"output is {output}, a file of the calibration text. Name another file.")
    check_target(output, overwrite)
    if checkpoint is not None:
        require_writable(checkpoint)
        if checkpoint.resolve() == output.resolve():
            raise ValueError(f"checkpoint and output are both {output}; expected a file for each. Name another one.")
        check_checkpoint(checkpoint)
