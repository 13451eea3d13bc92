"""The `varedit` command. Commands import what they need when they run: `varedit --help` loads neither PyTorch nor
diffusers.

Exit codes: 0 done, 1 our fault, 2 bad input, or more than the device holds (one
line on stderr: the value and the fix), 130 interrupted.
"""

import logging
import sys
import warnings
from typing import Annotated

import typer

from varedit import __version__
from varedit.cli import batch, convert, data, doctor, edit, evaluate, inspect, options, replay, session, sign, train

app = typer.Typer(
    name="varedit",
    help="Edit images by instructions, with next-scale prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(edit.edit)
app.command()(batch.batch)
app.add_typer(session.app, name="session")
app.command()(replay.replay)
app.command()(sign.sign)
app.command()(convert.convert)
app.add_typer(data.app, name="data")
app.add_typer(train.app, name="train")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(inspect.app, name="inspect")
app.command()(doctor.doctor)

# What the command line parser raises on unknown options, missing arguments and values of the wrong type.
_UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"varedit {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit. `arguments` default to the process's own."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logging.getLogger("varedit").handlers = [handler]
    # Every reader of pictures has its own limit and says so; Pillow would warn of half of it with a line of source.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")
    if hasattr(sys.stdout, "reconfigure"):  # a file's name need not be text: the edit is done when it is printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Of one's own accord typer would expand * and $NAME on Windows, in instructions too.
        code = app(args=arguments, prog_name="varedit", standalone_mode=False, windows_expand_args=False)
    except _UsageError as error:
        reason = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        code = _fail(f"{reason}; see varedit --help") if reason else 2  # none where the help was all that was wanted
    except ValueError as error:  # the public edge of the package: the value and the fix, in one line
        code = _fail(str(error))
    except RuntimeError as error:
        full = options.out_of_memory(error)
        if full is None:
            raise
        code = _fail(f"{full}: take a smaller size, model or batch, --dtype bfloat16, or --device cpu")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        sys.stderr.write("interrupted\n")
    sys.exit(code or 0)


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return 2
