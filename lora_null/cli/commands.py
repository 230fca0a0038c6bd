"""The commands that read a model, covariances or an adapter and write another: calibrate, add, export, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import LoraNullConfig
from ..models.settings import Loading
from ..system.files import require_writable
from .options import Model, Overwrite, Progress, Seed, Targets, VerifyBase, parse_targets


def calibrate(
    model: Model,
    data: Annotated[
        Path | None, typer.Option(help="Text file, or .jsonl file with one document per line.", show_default=False)
    ] = None,
    generate: Annotated[int, typer.Option(help="Tokens that the model writes itself, beside the data or instead.")] = 0,
    output: Annotated[Path, typer.Option(help="Covariance file to write.")] = Path("covariances.safetensors"),
    field: Annotated[str | None, typer.Option(help="Field of the .jsonl objects.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Read documents up to this many tokens.")] = 65536,
    sequence_length: Annotated[int, typer.Option(help="Longer documents are cut.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Documents per forward pass.")] = 16,
    target_modules: Targets = "all-linear",
    mask: Annotated[str, typer.Option(help="Which tokens count: attention or none.")] = "attention",
    accumulate: Annotated[str, typer.Option(help="Precision of the sums: fp32 or fp64.")] = "fp32",
    checkpoint: Annotated[
        Path | None, typer.Option(help="File of the sums in progress; an interrupted run goes on from it.")
    ] = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="One decoder layer at a time.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print memory, tokens, time and size, and write nothing.")
    ] = False,
    *,
    loading: Loading,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    progress: Progress = True,
) -> None:
    """Sum the activation covariances of a model over calibration text."""
    from ..calibration.calibrate import calibrate as run
    from ..calibration.estimate import estimate
    from ..calibration.masks import is_encoder_decoder
    from ..calibration.options import Options
    from ..calibration.own_text import own_text
    from ..calibration.texts import check_sizes, read_on_both_sides, read_texts, token_batches
    from ..models.loading import load_model

    if data is None and generate == 0:
        raise ValueError(
            "calibrate has no text; expected --data FILE with text like what must not be forgotten, --generate TOKENS, "
            "which the model writes itself, or both."
        )
    _check_outputs(output, checkpoint, data, overwrite)
    sizes = {"sequence_length": sequence_length, "batch_size": batch_size, "max_tokens": max_tokens}
    check_sizes(**sizes)
    options: dict[str, Any] = dict(mask=mask, accumulate=accumulate, checkpoint=checkpoint, low_memory=low_memory)
    checked = Options(**options)
    texts = None if data is None else read_texts(data, field=field)
    config = LoraNullConfig(target_modules=parse_targets(target_modules), seed=seed)
    loaded, tokenizer = load_model(model, loading)
    batches = [] if texts is None else token_batches(tokenizer, texts, **sizes, seed=seed)
    if generate:
        batches += own_text(loaded, tokenizer, generate, seed=seed, progress=progress)
    if is_encoder_decoder(loaded):
        batches = read_on_both_sides(batches)
    if dry_run:
        typer.echo(estimate(loaded, batches, config, checked))
        return
    covariances = run(loaded, batches, config, **options, progress=progress)
    covariances.save(output, overwrite=overwrite)
    typer.echo(f"{output}: {covariances!r}, from {_sources(data, generate)}")


def _sources(data: Path | None, generate: int) -> str:
    """Say what the covariances cover, and what they may not."""
    own = "text that the model wrote"
    if data is None:
        return own
    if generate:
        return f"{data} and {own}"
    return f"{data}. What is in no text is not protected: --generate 16384 adds {own}."


def add(
    files: Annotated[list[Path], typer.Argument(help="Files of calibrate, of one model.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Covariance file to write.")] = Path("covariances.safetensors"),
    weights: Annotated[str | None, typer.Option(help="How much each counts, with commas; default: 1.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Add covariances of several texts, so that an adapter leaves all of them alone."""
    from ..covariances.covariances import Covariances, check_target

    require_writable(output)
    check_target(output, overwrite)
    if output.resolve() in [file.resolve() for file in files]:
        raise ValueError(f"output is {output}, one of the files to add. Name another file.")
    try:
        numbers = [1.0] * len(files) if weights is None else [float(part) for part in weights.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(files):
        raise ValueError(f"weights is {weights!r}; expected {len(files)} numbers with commas, one for each file.")
    loaded = [Covariances.load(file) for file in files]
    total, *others = loaded if weights is None else map(Covariances.weighted, loaded, numbers)
    for covariances in others:
        total = total + covariances
    total.save(output, overwrite=overwrite)
    typer.echo(f"{output}: {total!r}")


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
) -> None:
    """Convert a checkpoint to a plain LoRA adapter: one rank, lora_alpha = r, no scaling left."""
    from ..adapters.export import export_adapter
    from ..adapters.files import check_target
    from ..models.loading import parse_dtype

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
    typer.echo(f"{output}: plain LoRA adapter of rank {r}.")


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
) -> None:
    """Fold an adapter into its base model and write a plain Hugging Face checkpoint."""
    from ..adapters.load import load_adapter
    from ..adapters.merge import check_merge_target, save_merged
    from ..adapters.merge import merge as fold
    from ..models.loading import load_model, load_tokenizer, processor_files

    require_writable(output)
    check_merge_target(output, overwrite=overwrite, inputs=(model, adapter), tokenizer=load_tokenizer(model, loading))
    loaded, tokenizer = load_model(model, loading)
    folded = fold(load_adapter(loaded, adapter, verify_base=verify_base, pooling=pooling))
    save_merged(folded, tokenizer, output, beside=processor_files(model, loading), overwrite=overwrite)
    typer.echo(f"{output}: merged model.")


def _check_outputs(output: Path, checkpoint: Path | None, data: Path | None, overwrite: bool) -> None:
    """Refuse before any work is done what ``calibrate`` cannot write, or may not."""
    from ..calibration.checkpoint import check_checkpoint
    from ..covariances.covariances import check_target

    require_writable(output)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; expected the name of the covariance file to write.")
    if data is not None and output.resolve() == data.resolve():
        raise ValueError(f"output is {output}, the file of the calibration text. Name another file.")
    check_target(output, overwrite)
    if checkpoint is not None:
        require_writable(checkpoint)
        if checkpoint.resolve() == output.resolve():
            raise ValueError(f"checkpoint and output are both {output}; expected a file for each. Name another one.")
        check_checkpoint(checkpoint)
