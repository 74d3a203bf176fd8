"""Rows that need the packages of the extra `datasets`: parquet files, and datasets of the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prismaquant_ray.calibration.files import loading
from prismaquant_ray.errors import InputError, ResourceError
from prismaquant_ray.settings.texts import hub_parts

_FIELDS = ("text", "prompt", "completion", "messages", "tools")
_INSTALL = "pip install 'prismaquant-ray[datasets]'"


def parquet_rows(data: bytes, name: str) -> list[dict[str, Any]]:
    """The rows of a parquet file, with the columns that rows of text have; InputError when it cannot be read."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{name}: parquet files need the package pyarrow; {_INSTALL}") from error
    with loading(lambda error: f"{name}: is no parquet file that can be read ({_short(error)})"):
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        known = [column for column in file.schema_arrow.names if column in _FIELDS]
        if not known:
            columns = ", ".join(file.schema_arrow.names[:8])
            raise InputError(f"{name}: has the columns {columns}; rows have text, prompt and completion, or messages")
        rows: list[dict[str, Any]] = file.read(columns=known).to_pylist()
        return rows


def hub_rows(uri: str, characters: int) -> Iterator[Mapping[str, Any]]:
    """The first rows of a dataset of the hub, until their fields have so many `characters`. They are not kept.

    Raises:
        InputError: the package is missing, or there is no such dataset, configuration or split.
        ResourceError: the hub does not answer.
    """
    name, revision, config, split = hub_parts(uri)
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{uri}: datasets of the hub need the package datasets; {_INSTALL}") from error
    with loading(lambda error: f"{uri}: cannot be read ({_short(error)})"):
        try:
            stream = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
            seen = 0
            for row in stream:
                kept = {key: row[key] for key in _FIELDS if key in row}
                yield kept or dict.fromkeys(row, "")
                seen += sum(len(str(value)) for value in kept.values()) + 1
                if seen >= characters:
                    return
        except (ConnectionError, TimeoutError) as error:
            raise ResourceError(f"{uri}: the hub does not answer ({_short(error)}); try again later") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
