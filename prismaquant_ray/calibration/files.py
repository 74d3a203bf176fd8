"""Reading users' text files, and loading a model's tokenizer and processor files with libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prismaquant_ray.errors import InputError

# transformers raises these for a model's file that is missing, is not JSON, or is JSON of another shape.
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)


def read_text(path: Path, name: str) -> str:
    """The contents of a UTF-8 file, with or without a byte order mark; InputError, with `name`, when it is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start:,}); convert it to UTF-8.") from error
    except OSError as error:
        raise InputError(f"{name} {path} cannot be read: {error.strerror}.") from error


@contextmanager
def loading(refusal: Callable[[Exception], str]) -> Iterator[None]:
    """Inside the with-block a model's tokenizer or processor is loaded; InputError, as `refusal` says, if it cannot."""
    try:
        yield
    except _DAMAGED as error:
        raise InputError(refusal(error)) from error
    except Exception as error:
        # tokenizers has no class of its own for a damaged tokenizer.json; anything finer is not about these files.
        if type(error) is not Exception:
            raise
        raise InputError(refusal(error)) from error
