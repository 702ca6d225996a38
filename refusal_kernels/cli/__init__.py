"""The command line: `refusal-kernels COMMAND`.

A command is a module of this package that defines a function of the module's name. The function's
parameters are the options and its docstring is the help text, so a new command is one new file.
Import what is slow to import (torch, transformers, most of this package) inside the function:
every module here is imported to show a help text.
"""

import errno
import importlib
import os
import pkgutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.text import Text

from refusal_kernels.cli.common import clean_up, errors
from refusal_kernels.cli.groups import expanded
from refusal_kernels.errors import InputError, first_line

TRACEBACK = "REFUSAL_KERNELS_TRACEBACK"  # set, it shows where an error of others comes from
# what a disk, a folder or a name can bring at any write
DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR),
)


def commands() -> Iterator[Callable[..., Any]]:
    """Give the function of every command, by name."""
    for module in pkgutil.iter_modules(__path__):
        command = getattr(importlib.import_module(f"{__name__}.{module.name}"), module.name, None)
        if callable(command):
            yield command


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: brackets stay, and descriptions get the width
    context_settings={
        "help_option_names": ["-h", "--help"],
        "default_map": {"help": False},  # without a value Typer loads pydantic to convert it
    },
    help="Find, remove, add and measure one direction in a chat model's residual stream. "
    "'demo' shows all of it on a toy model; on your own model run extract, select, evaluate.",
)
for command in commands():
    # given whole, because Typer would cut the docstring
    app.command(
        short_help=(command.__doc__ or "").partition("\n")[0],
        context_settings=getattr(command, "context_settings", None),
    )(expanded(command))


def _refuse(reason: str) -> NoReturn:
    clean_up()
    errors.print(Text(f"error: {reason}", style="red"), soft_wrap=True)
    sys.exit(2)


def _raised_in(error: Exception) -> str | None:
    """Return the file, of a model or a library, that raised an error; None for this package's."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    package = Path(__file__).parents[1]
    return None if package in Path(frames[-1]).parents else frames[-1]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is PyTorch's or Python's about memory, of an accelerator or of the host."""
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError") or (
        "not enough memory" in str(error)
    )


def main() -> None:
    """Run the command line; bad input ends in one line on stderr and exit code 2."""
    # SIGTERM is treated as Ctrl-C: what is done is kept, and temporary files are removed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for argument in sys.argv[1:]:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            _refuse(f"the argument {argument!r} is not UTF-8")
    try:
        app()
    except InputError as error:
        _refuse(str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK:
            _refuse(f"{error.filename or 'a file'} cannot be used: {error.strerror}")
        why = first_line(error)
        if is_out_of_memory(error):
            _refuse(f"out of memory ({why}); expected a smaller --batch-size, or --load-in")
        where = _raised_in(error)
        if where is None or os.environ.get(TRACEBACK):
            raise
        _refuse(f"{type(error).__name__} in {where}: {why} ({TRACEBACK}=1 shows the way)")
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)
