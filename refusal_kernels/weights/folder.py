"""A new folder: made beside its place, and given its name when all of it is there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refusal_kernels.errors import InputError


def check_new(folder: Path) -> None:
    """Refuse a place that is taken."""
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} is there already; expected a folder that can be made")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder; it becomes ``folder`` if all went well, and is removed if not.

    Raises
    ------
    InputError
        If the place is taken, or cannot be written.
    """
    check_new(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
