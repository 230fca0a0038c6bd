"""The commands that judge: eval, inspect, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..models.settings import Loading
from .options import AsJson, Model, Overwrite, Progress, Rank, Seed, VerifyBase, parse_names


def evaluate(
    model: Model,
    adapters: Annotated[
        list[Path], typer.Argument(help="Adapters, or merged or fully tuned models.", show_default=False)
    ],
    keep: Annotated[Path | None, typer.Option(help="Text that should not be forgotten.")] = None,
    task: Annotated[Path | None, typer.Option(help="Text of the task.")] = None,
    questions: Annotated[Path | None, typer.Option(help=".jsonl: question, choices, answer, perhaps kind.")] = None,
    lm_eval_tasks: Annotated[str | None, typer.Option(help="Of lm-evaluation-harness, with commas.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Longer documents are read in windows.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 16,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap behind the intervals.")] = 2000,
    *,
    loading: Loading,
    seed: Seed = 0,
    verify_base: VerifyBase = True,
    json: AsJson = False,
    progress: Progress = True,
) -> None:
    """Measure tuned models beside the pre-trained one: what was kept, what was learned.

    Example: lora-null eval MODEL adapter --keep text.jsonl --task task.jsonl
    """
    from ..evaluation import evaluate as run
    from ..evaluation.documents import read_documents
    from ..evaluation.questions import read_questions
    from ..evaluation.tuned import load_tuned
    from ..models.loading import choose_device
    from ..quickstart.measure import Stages
    from .output import print_evaluations

    # Files are read before any model is loaded: a mistake in them shows at once.
    texts = {name: read_documents(name, path) for name, path in (("keep", keep), ("task", task)) if path is not None}
    asked = None if questions is None else read_questions(questions)
    found, stages = {}, Stages(choose_device(loading.device))
    for path in adapters:
        with stages.stage(f"load {path.name}"):
            tuned, base, tokenizer = load_tuned(model, path, loading, verify_base=verify_base)
        with stages.stage(f"evaluate {path.name}"):
            found[str(path)] = run(
                tuned,
                tokenizer,
                **texts,
                questions=asked,
                lm_eval_tasks=parse_names(lm_eval_tasks) or (),
                base=base,
                sequence_length=sequence_length,
                batch_size=batch_size,
                resamples=resamples,
                seed=seed,
                progress=progress,
            )
    print_evaluations(model, found, stages.done, as_json=json)


def report(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.", show_default=False)],
    covariances: Annotated[Path | None, typer.Option(help="File written by calibrate.")] = None,
    eval: Annotated[Path | None, typer.Option(help="File of eval --json.")] = None,
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    overwrite: Overwrite = False,
    json: AsJson = False,
    progress: Progress = True,
) -> None:
    """Write one page about an adapter: what was done, kept and learned, with pictures.

    Example: lora-null report adapter --covariances cov.safetensors
    """
    from ..covariances.covariances import Covariances
    from ..evaluation import write_report
    from .output import print_result

    loaded = None if covariances is None else Covariances.load(covariances)
    path = write_report(adapter, output, covariances=loaded, evaluation=eval, overwrite=overwrite, progress=progress)
    print_result(f"{path}: report on {adapter}", {"output": str(path), "adapter": str(adapter)}, as_json=json)


def inspect(
    path: Annotated[Path, typer.Argument(help="Covariance file or adapter folder.", show_default=False)],
    r: Rank = 128,
    covariances: Annotated[
        Path | None, typer.Option(help="With an adapter: measure how it answers to these activations.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="With covariances: those of another half of the text, to check them on.")
    ] = None,
    json: AsJson = False,
    progress: Progress = True,
) -> None:
    """Print null energy, effective rank and condition per layer with advice, or what an adapter changes.

    Example: lora-null inspect cov.safetensors --r 32
    """
    from ..covariances.covariances import Covariances
    from ..evaluation.advice import advise
    from ..evaluation.report import adapter_report, spectrum_report
    from .output import print_adapter, print_spectra

    if path.is_dir():
        if against is not None:
            raise ValueError(
                f"against is {against}, but {path} is an adapter folder; the option goes with a file of covariances. "
                "What an adapter does to other text is shown by --covariances."
            )
        loaded = None if covariances is None else Covariances.load(covariances)
        print_adapter(*adapter_report(path, loaded, progress=progress), as_json=json)
    else:
        if covariances is not None:
            raise ValueError(
                f"covariances is {covariances}, but {path} is no folder; the option goes with an adapter folder."
            )
        loaded = Covariances.load(path)
        other = None if against is None else Covariances.load(against)
        rows = spectrum_report(loaded, r, against=other, progress=progress)
        print_spectra(loaded, rows, advise(rows, r), r, as_json=json)
