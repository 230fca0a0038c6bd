"""The command line ``lora-null``; every flag has the name of the Python argument that it sets.

Libraries are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

import typer

from ..quickstart.settings import Settings
from ..system.environment import switched_on
from ..system.version import __version__
from . import commands, judging, starting
from .options import AsJson, Device, Rank, with_flags
from .run_file import said_in_file

# What a user can cause and mend. Anything else is a defect of this package and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError)
# What the parser of the command line raises. typer exports one of its kinds only, and not every typer has click for it.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="lora-null",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (commands.calibrate, commands.add, starting.init, commands.export, commands.merge):
    app.command()(with_flags(command))
app.command("eval")(with_flags(judging.evaluate))
app.command()(with_flags(judging.inspect))
app.command()(with_flags(judging.report))


@app.command()
@with_flags
def bench(
    d: Annotated[int, typer.Option("--d", help="Input features.")] = 2048,
    m: Annotated[int, typer.Option("--m", help="Output features.")] = 2048,
    r: Rank = 32,
    tokens: Annotated[int, typer.Option(help="Tokens per call.")] = 2048,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(help="Timed calls of each operation.")] = 7,
    json: AsJson = False,
) -> None:
    """Time this package's operations beside plain torch on this machine, for one layer shape.

    Example: lora-null bench --d 4096 --m 4096 --r 64 --device cuda
    """
    from ..models.loading import choose_device, parse_dtype
    from .bench import measure
    from .output import print_timings

    chosen = parse_dtype(dtype)
    if chosen is None:
        raise ValueError("dtype is auto; name one of float32, bfloat16, float16.")
    timings = measure(d, m, r, tokens, dtype=chosen, device=choose_device(device), repeats=repeats)
    print_timings(timings, f"d={d} m={m} r={r} tokens={tokens} {dtype}", as_json=json)


@app.command()
@with_flags
def tune(
    only: Annotated[str, typer.Option(help="Of kernels,covariance,linear.")] = "kernels,covariance,linear",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    minutes: Annotated[float, typer.Option(help="Start nothing more after this time.")] = float("inf"),
    json: AsJson = False,
) -> None:
    """Time the kernels on this machine's GPU and keep the fastest configurations.

    Example: lora-null tune --minutes 8
    """
    from ..models.loading import parse_dtype
    from ..ops.tune import tune as measure
    from .output import print_result

    chosen = parse_dtype(dtype)
    if chosen is None:
        raise ValueError("dtype is auto; name one of bfloat16, float16, float32.")
    output = measure(only.split(","), dtype=chosen, minutes=minutes)
    print_result(f"Written to {output}", {"output": str(output)}, as_json=json)


@app.command()
def doctor(json: AsJson = False) -> None:
    """Show versions, compiler, extension, devices and settings, and what will be used on this machine.

    Example: lora-null doctor --json
    """
    from .doctor import examine
    from .output import print_findings

    print_findings(examine(), as_json=json)


@app.command()
@with_flags
def quickstart(settings: Settings, json: AsJson = False) -> None:
    """Calibrate, fine-tune with LoRA and LoRA-Null, compare what each forgot, save, reload.

    Example: lora-null quickstart --steps 64 --learning-rate 1e-3
    """
    from ..quickstart import tables
    from ..quickstart.run import run
    from .output import print_result

    results = run(settings)
    if json:
        print_result("", results, as_json=True)
    else:
        tables.show(results, settings.output / "adapter")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora_null {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """LoRA-Null: adapters in the null space of a layer's activations."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def main() -> None:
    """Run the command line. A mistake of the user ends in one message and exit code 2, not in a traceback."""
    try:
        code = app(prog_name=app.info.name, standalone_mode=False)
    except typer.Abort:
        sys.exit(1)
    except UsageError as error:
        # click's message, which can run over lines, without its block of usage
        text = " ".join(error.format_message().split()) + said_in_file(error)
        command = error.ctx.command_path if error.ctx else app.info.name
        _refuse(f"{text.rstrip('.')}{'' if text.endswith('?') else '.'} See {command} --help.")
    except USER_ERRORS as error:
        if switched_on("LORA_NULL_TRACEBACK"):
            raise
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        _refuse(text or type(error).__name__)
    sys.exit(code or 0)


def _refuse(text: str) -> NoReturn:
    typer.echo(f"error: {text}", err=True)
    sys.exit(2)
