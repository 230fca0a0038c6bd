"""The command that makes an adapter: from a file of covariances, or from text in one pass."""

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
    Method,
    Model,
    Overwrite,
    Progress,
    Rank,
    Seed,
    Targets,
    help_of,
    parse_names,
    parse_numbers,
    parse_pattern,
    parse_targets,
)
from .processes import joined
from .reading import Text


def init(
    model: Model,
    output: Annotated[
        list[Path],
        typer.Argument(help="Covariance file if no --data, adapter.", show_default=False),
    ],
    covariances: Annotated[Path | None, typer.Option(hidden=True)] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Text instead; takes calibrate's options.")] = None,
    keep_covariances: Annotated[Path | None, typer.Option(help="With --data: write them, too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --data: print the memory.")] = False,
    r: Rank = 128,
    lora_alpha: Annotated[float | None, typer.Option(help=help_of(LoraNullConfig, "lora_alpha"))] = None,
    target_modules: Targets = "all-linear",
    exclude_modules: Annotated[str | None, typer.Option(help=help_of(LoraNullConfig, "exclude_modules"))] = None,
    train: Annotated[str | None, typer.Option(help=help_of(LoraNullConfig, "train"))] = None,
    freeze_a: Annotated[bool | None, typer.Option("--freeze-a/--no-freeze-a", hidden=True)] = None,
    energy: Annotated[float | None, typer.Option(help=help_of(LoraNullConfig, "energy"))] = None,
    task: Annotated[Path | None, typer.Option(help="Covariances of the task's text.")] = None,
    group_pooling: Annotated[str | None, typer.Option(help=help_of(LoraNullConfig, "group_pooling"))] = None,
    lora_dropout: Annotated[float, typer.Option(help=help_of(LoraNullConfig, "lora_dropout"))] = 0.0,
    layers_to_transform: Annotated[
        str | None, typer.Option(help=help_of(LoraNullConfig, "layers_to_transform"))
    ] = None,
    layers_pattern: Annotated[str | None, typer.Option(hidden=True)] = None,
    rank_pattern: Annotated[list[str] | None, typer.Option(help=help_of(LoraNullConfig, "rank_pattern"))] = None,
    alpha_pattern: Annotated[list[str] | None, typer.Option(help=help_of(LoraNullConfig, "alpha_pattern"))] = None,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help=help_of(LoraNullConfig, "use_rslora"))] = False,
    modules_to_save: Annotated[str | None, typer.Option(help=help_of(LoraNullConfig, "modules_to_save"))] = None,
    method: Annotated[Method, typer.Option(help="How null spaces are found.")] = Method.auto,
    weights: Annotated[str | None, typer.Option(hidden=True)] = None,
    field: Annotated[str | None, typer.Option(hidden=True)] = None,
    roles: Annotated[str | None, typer.Option(hidden=True)] = None,
    max_tokens: Annotated[int | None, typer.Option(hidden=True)] = None,
    sequence_length: Annotated[int | None, typer.Option(hidden=True)] = None,
    batch_size: Annotated[int | None, typer.Option(hidden=True)] = None,
    mask: Annotated[str, typer.Option(hidden=True)] = "attention",
    accumulate: Annotated[str, typer.Option(hidden=True)] = "fp32",
    verify_base: Annotated[bool, typer.Option("--verify-base/--no-verify-base", hidden=True)] = True,
    *,
    loading: Loading,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: AsJson = False,
    progress: Progress = True,
) -> None:
    """Write the adapter that training starts from; it changes no output yet.

    Example: lora-null init MODEL cov.safetensors adapter --r 32
    """
    from ..covariances.covariances import Covariances
    from .output import print_result

    text = Text(data or (), None, weights, field, roles, max_tokens, sequence_length, batch_size, mask)
    file, folder = _inputs(output, covariances, text.data)
    if not text.data and (dry_run or keep_covariances):
        raise ValueError("dry_run and keep_covariances go with --data; there are covariances in a file already.")
    config = LoraNullConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=parse_targets(target_modules),
        freeze_a=freeze_a,
        lora_dropout=lora_dropout,
        seed=seed,
        exclude_modules=None if exclude_modules is None else parse_targets(exclude_modules, "exclude_modules"),
        layers_to_transform=parse_numbers(layers_to_transform, "layers_to_transform"),
        layers_pattern=parse_names(layers_pattern),
        rank_pattern=parse_pattern(rank_pattern, int, "rank_pattern"),
        alpha_pattern=parse_pattern(alpha_pattern, float, "alpha_pattern"),
        use_rslora=use_rslora,
        modules_to_save=parse_names(modules_to_save),
        train=train,
        energy=energy,
        group_pooling=int(group_pooling) if group_pooling and group_pooling.isdecimal() else group_pooling,
    )
    loaded_task = None if task is None else Covariances.load(task)
    if text.data:
        sums = {"mask": text.counted, "accumulate": accumulate, "progress": progress}
        chosen = {"method": method.value, "keep": keep_covariances, "verify_base": verify_base}
        with joined() as first:
            prepared = _one_pass(model, text, sums, config, loading, loaded_task, chosen)
            if dry_run and first:
                print_result(str(prepared.plan), asdict(prepared.plan), as_json=json)
            if not dry_run:
                prepared.run(folder, overwrite=overwrite)
        if dry_run or not first:
            return
    else:
        options: dict[str, Any] = {"method": method.value, "verify_base": verify_base, "progress": progress}
        with joined() as first:
            _from_file(model, file, folder, config, loading, loaded_task, overwrite, options)
        if not first:
            return
    said = (
        f"{folder}: initial adapter. Train it with lora_null.load_adapter(model, path, is_trainable=True) or "
        "lora_null.peft.load_trainable(model, path)"
        + (", and covariances=Covariances.load(...)." if config.train == "b_in_basis" else ".")
    )
    print_result(said, {"output": str(folder), "config": config.to_dict()}, as_json=json)


def _inputs(paths: list[Path], covariances: Path | None, data: Sequence[Path]) -> tuple[Path | None, Path]:
    """Return the file of covariances and the output from the arguments, of which the first may be an option."""
    *first, output = paths
    given = [*first, *filter(None, [covariances])]
    if len(given) + bool(data) != 1:
        named = ", ".join(map(str, [*given, *data])) or "nothing"
        raise ValueError(
            f"The adapter {output} is to be made from {named}; expected one file of covariances (lora-null init MODEL "
            "covariances output) or text (lora-null init MODEL output --data text.jsonl)."
        )
    require_writable(output)
    return (given[0] if given else None), output


def _from_file(
    model: str,
    covariances: Path | None,
    output: Path,
    config: LoraNullConfig,
    loading: Loading,
    task: Any,
    overwrite: bool,
    options: dict[str, Any],
) -> None:
    from ..adapters.files import check_target
    from ..adapters.initialize import initialize
    from ..adapters.save import save_adapter
    from ..covariances.covariances import Covariances
    from ..models.loading import load_model
    from ..system.distributed import in_first_process

    assert covariances is not None
    check_target(output, overwrite)
    loaded_covariances = Covariances.load(covariances)
    loaded, _ = load_model(model, loading)
    initialize(loaded, loaded_covariances, config, task=task, **options)
    in_first_process(lambda: save_adapter(loaded, output, overwrite=overwrite))


def _one_pass(
    model: str,
    text: Text,
    sums: dict[str, Any],
    config: LoraNullConfig,
    loading: Loading,
    task: Any,
    chosen: dict[str, Any],
) -> Any:
    from ..calibration.options import Options
    from ..calibration.texts import labelled
    from ..models.loading import choose_device, load_tokenizer
    from ..onepass.initialize import prepare

    if loading.device_map is not None:
        raise ValueError(
            f"device_map is {loading.device_map!r} beside --data, which reads one layer at a time; expected a device."
        )
    if chosen["keep"] is not None:
        require_writable(chosen["keep"])
    options = Options(device=choose_device(loading.device), low_memory=True, **sums)
    batches = text.read(load_tokenizer(model, loading), config.seed)
    if text.roles is not None:
        batches = labelled(batches)
    return prepare(model, batches, config, options, loading, task=task, **chosen)
