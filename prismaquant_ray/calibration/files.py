"""Reading users' text files, and loading a model's tokenizer and processor files with libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prismaquant_ray.errors import InputError, PrismaquantError


def read_text(path: Path, name: str) -> str:
    """The contents of a UTF-8 file, with or without a byte order mark; InputError, with `name`, when it is none."""
    check_file(path, name)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start:,}); convert it to UTF-8.") from error
    except OSError as error:
        raise InputError(f"{name} {path} cannot be read: {error.strerror}.") from error


def check_file(path: Path, name: str) -> None:
    """InputError, with `name`, for a pipe or a device: reading it might never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{name} {path} cannot be read: it is not a file.")


@contextmanager
def loading(refusal: Callable[[Exception], str]) -> Iterator[None]:
    """Inside the with-block libraries load or use a model's tokenizer or processor; InputError if they cannot.

    They have no exceptions of their own for files that are damaged: what they raise is of any kind.
    """
    try:
        yield
    except (PrismaquantError, ImportError):
        raise
    except Exception as error:
        raise InputError(refusal(error)) from error
