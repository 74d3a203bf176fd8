"""The reference of the configuration is the schema's: every key is in it, and what it says is what is accepted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import annotated_types as at
import pytest
import yaml
from pydantic import Field

from docs.configuration import Key, render, sections
from prismaquant_ray.config import Config, load_config
from prismaquant_ray.errors import ConfigError
from prismaquant_ray.settings.values import Section

PAGE = Path(__file__).parents[1] / "docs/configuration.md"
MINIMAL = {
    "model": {"source": "a"},
    "calibration": {"text": "b"},
    "budget": {"bpp": 5},
    "evaluation": {"text": "c"},
    "store": {"run": "d", "output": "e"},
}
KEYS = [(section.path, key) for section in sections() for key in section.keys]
BOUNDED = [(path, key, bound) for path, key in KEYS for bound in key.bounds]


def test_the_page_is_what_the_schema_gives() -> None:
    assert PAGE.read_text() == render(), (
        "the schema changed: .venv/bin/python docs/configuration.py > docs/configuration.md"
    )


def test_every_key_of_the_schema_is_in_it() -> None:
    schema = Config.model_json_schema()
    expected = sorted(
        (tuple(body["properties"]), tuple(body.get("required", ())))
        for body in (schema, *schema["$defs"].values())
        if "properties" in body
    )
    found = sorted(
        (tuple(k.name for k in section.keys), tuple(k.name for k in section.keys if k.default is None))
        for section in sections()
    )
    assert found == expected


def with_value(path: str, key: Key, value: Any) -> dict[str, Any]:
    """The smallest configuration with one key set; what only goes with it is set, too."""
    body = yaml.safe_load(yaml.safe_dump(MINIMAL))
    node = body
    for part in path.split(".") if path else ():
        if part.endswith("[]"):
            name = part.removesuffix("[]")
            # What is left of a share needs another source to go to.
            others = [{"path": "t"}] if key.name == "share" and value != 1.0 else []
            node[name] = [{"path": "s"}, *others] if name == "text" else [{"match": "*", "format": "BF16"}]
            node = node[name][0]
        else:
            node = node.setdefault(part, {})
    if path == "budget" and key.name in ("bytes", "vram"):
        node.clear()
    if path == "budget" and key.name != "context":
        node["context"] = 4096
    node[key.name] = [value] if key.type.startswith("list") else value
    return body


def accepted(tmp_path: Path, body: dict[str, Any]) -> bool:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(body))
    try:
        load_config(path)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(("path", "key", "bound"), BOUNDED, ids=lambda entry: getattr(entry, "name", str(entry)))
def test_a_bound_is_where_values_begin_to_be_refused(
    tmp_path: Path, path: str, key: Key, bound: at.BaseMetadata
) -> None:
    whole = "whole number" in key.type or "bytes" in key.type
    match bound:
        case at.Gt(gt=end):
            refused, taken = end, end + 1 if whole else math.nextafter(end, math.inf)
        case at.Ge(ge=end):
            refused, taken = end - 1 if whole else math.nextafter(end, -math.inf), end
        case at.Lt(lt=end):
            refused, taken = end, math.nextafter(end, -math.inf)
        case at.Le(le=end):
            refused, taken = end + 1 if whole else math.nextafter(end, math.inf), end
        case at.MinLen():
            refused, taken = "", "x"
    assert accepted(tmp_path, with_value(path, key, taken))
    assert not accepted(tmp_path, with_value(path, key, refused))


@pytest.mark.parametrize(
    ("path", "key"),
    [(p, k) for p, k in KEYS if k.default and k.default.startswith("`")],
    ids=lambda e: getattr(e, "name", e),
)
def test_a_default_may_be_written_and_changes_nothing(tmp_path: Path, path: str, key: Key) -> None:
    assert key.default is not None
    body = with_value(path, key, None)
    node: Any = body
    for part in path.split(".") if path else ():
        node = node[part.removesuffix("[]")]
        node = node[0] if part.endswith("[]") else node
    written = tmp_path / "written.yaml"
    node[key.name] = yaml.safe_load(key.default.strip("`"))
    if path == "budget" and not any(node.get(kind) for kind in ("bpp", "bytes", "vram")):
        node["bpp"] = 5
    written.write_text(yaml.safe_dump(body))
    del node[key.name]
    if path == "budget" and not any(node.get(kind) for kind in ("bpp", "bytes", "vram")):
        node["bpp"] = 5
    left_out = tmp_path / "left_out.yaml"
    left_out.write_text(yaml.safe_dump(body))
    if (path, key.name) != ("budget", "bpp"):
        assert load_config(written) == load_config(left_out)


def test_every_key_says_what_it_means() -> None:
    assert [f"{path}.{key.name}" for path, key in KEYS if not key.meaning.endswith(".")] == []


def test_a_key_is_one_row() -> None:
    class Described(Section):
        """All."""

        first: int = Field(default=1, ge=0, description="Tokens per sequence.")

    assert "| key | value | default | bounds | meaning |\n" in render(Described)
    assert "| `first` | whole number | `1` | ≥ 0 | Tokens per sequence. |\n" in render(Described)


def test_a_bound_without_words_is_an_error() -> None:
    class Other(Section):
        """All."""

        key: int = Field(default=4, multiple_of=2)

    with pytest.raises(TypeError, match="no words yet"):
        render(Other)
