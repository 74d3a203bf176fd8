"""Claims about the one place that reads JSON and YAML: what is too much is refused before it costs anything."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from prismaquant_ray import parsing
from prismaquant_ray.parsing import MAX_BYTES, MalformedError, parse_json, parse_object, parse_yaml, read_yaml
from prismaquant_ray.storage.prefix import get_json
from prismaquant_ray.storage.store import Store


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"is not JSON \(it is empty\)"),
        (b"{", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b"{} {}", "is not JSON"),
        ("\ufeff{}", "is not JSON"),
        (b"1" + b"0" * 5000, "is not JSON"),
        (b"[" * 100_000, "nested deeper than 64 levels"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64 levels"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested deeper than 64 levels"),
        (rb'{"a": "\ud800"}', "half of a character"),
        (rb'{"\udc00": 1}', "half of a character"),
        (b"[" + b"{}," * 4_200_000 + b"{}]", "more than 3,145,728 values"),
    ],
)
def test_what_is_no_json_or_too_much_of_it_is_refused(text: bytes | str, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        parse_json(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "9223372036854775808", "1" + "0" * 400])
def test_numbers_are_bounded_where_they_are_computed_with(number: str) -> None:
    text = f'{{"a": [{number}]}}'
    assert parse_json(text) is not None
    with pytest.raises(MalformedError, match="has a number"):
        parse_json(text, finite=True)


def test_what_is_right_is_read() -> None:
    body: dict[str, Any] = {"a": [1, -(1 << 63), 1.5, None, True], "b": {"c": "é😀", "": []}}
    for ascii_only in (True, False):
        assert parse_object(json.dumps(body, ensure_ascii=ascii_only).encode(), finite=True) == body
    assert parse_json(b"[" * 64 + b"]" * 64)
    with pytest.raises(MalformedError, match="not a JSON object"):
        parse_object("[]")
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(MalformedError, match="a name twice"):
        parse_json('[{"a": 1, "a": 2}]', unique=True)


def test_a_file_of_a_store_is_refused_by_its_size_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 40)
    store = Store(tmp_path)
    with pytest.raises(MalformedError, match=r"has 1,099,511,627,776 bytes, of which at most 67,108,864 are read"):
        get_json(store, "large.json")
    with pytest.raises(KeyError):
        get_json(store, "absent.json")


def test_memory_is_bounded_whatever_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst that a byte can become, at a hundredth of the size."""
    monkeypatch.setattr(parsing, "_MAX_VALUES", parsing._MAX_VALUES // 100)
    values = parsing._MAX_VALUES - 2
    worst = (
        b"[" + b"[]," * (values // 2) + b"0]",
        b'[{"":0}' + b',{"":0}' * (values // 3 - 2) + b"]",
    )
    for text in worst:
        tracemalloc.start()
        parse_json(text)
        assert tracemalloc.get_traced_memory()[1] < 5_500_000, text[:20]
        tracemalloc.stop()
    assert MAX_BYTES < 100_000_000


LAUGHS = "a0: &a0 x\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("\x00", "is not YAML"),
        ("a: 2024-13-45", "is not YAML"),
        ("? [a, b]\n: c", "is not YAML"),
        ("a: !!python/object/apply:os.system [touch x]", "is not YAML"),
        ("[" * 3000, "nested deeper than 64 levels"),
        ("- " * 100 + "x", "nested deeper than 64 levels"),
        ("&a [*a]", "nested deeper than 64 levels"),
        ('a: "\\ud800"', "half of a character"),
        (LAUGHS, "more than 3,145,728 values"),
        ("a: " + "x" * 300_000, r"has 300,003 bytes, of which at most 262,144 are read"),
    ],
)
def test_what_is_no_yaml_or_too_much_of_it_is_refused(text: str, message: str) -> None:
    with pytest.raises(MalformedError, match=message) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_a_yaml_file_is_text_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"a: caf\xe9")
    with pytest.raises(MalformedError, match=r"is not UTF-8 text \(byte 6\)"):
        read_yaml(tmp_path / "latin")
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(MalformedError, match="is not a file"):
            read_yaml(path)
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "absent")
