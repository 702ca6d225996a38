"""The command line: `refusal-kernels COMMAND`."""

import signal
import sys

import typer
from rich.text import Text

from refusal_kernels.cli import (
    bench,
    convert,
    demo,
    doctor,
    evaluate,
    extract,
    orthogonalize,
    reproduce,
    select,
)
from refusal_kernels.cli.common import errors
from refusal_kernels.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: brackets stay, and descriptions get the width
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find, remove, add and measure one direction in a chat model's residual stream.",
)
for command in (
    demo.demo,
    extract.extract,
    select.select,
    evaluate.evaluate,
    evaluate.generate,
    reproduce.reproduce,
    orthogonalize.orthogonalize,
    convert.convert,
    bench.bench,
    doctor.doctor,
):
    # said outright, so that it is not cut
    app.command(short_help=(command.__doc__ or "").partition("\n")[0])(command)


def main() -> None:
    """Run the command line; bad input ends in one line on stderr and exit code 2."""
    # a job that is ended from outside keeps what it has and leaves nothing behind, as with Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except InputError as error:
        errors.print(Text(f"error: {error}", style="red"), soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)
