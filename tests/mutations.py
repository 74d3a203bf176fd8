"""Ways to break a file, by what it holds; equal dice break it equally."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Change = Callable[[Path, random.Random], None]


@dataclass(frozen=True)
class Mutation:
    """One way; `apply` may give settings for the command line instead of changing a file."""

    name: str
    apply: Callable[[Any, random.Random], tuple[str, ...] | None]


# Any file ------------------------------------------------------------------------------------------------------------


def _empty(path: Path, dice: random.Random) -> None:
    path.write_bytes(b"")


def _cut(path: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: dice.randrange(len(data))])


def _flipped(path: Path, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(dice.choice((1, 8))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)


def _noise(path: Path, dice: random.Random) -> None:
    path.write_bytes(dice.randbytes(dice.choice((3, 100, 5000))))


def _pipe(path: Path, dice: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path, dice: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("x")


def _missing(path: Path, dice: random.Random) -> None:
    path.unlink()


def _link(target: str) -> Change:
    def change(path: Path, dice: random.Random) -> None:
        path.unlink()
        path.symlink_to(path.parent if target == "." else path if target == "itself" else target)

    return change


ANY = (
    Mutation("empty", _empty),
    Mutation("cut", _cut),
    Mutation("flipped", _flipped),
    Mutation("noise", _noise),
    Mutation("a pipe", _pipe),
    Mutation("a folder", _folder),
    Mutation("missing", _missing),
    Mutation("a link to its folder", _link(".")),
    Mutation("a link to itself", _link("itself")),
    Mutation("a link to /dev/zero", _link("/dev/zero")),
)

# JSON ----------------------------------------------------------------------------------------------------------------

#: Written as they are into JSON, in place of a value.
HOSTILE = (
    "null", "true", "0", "-1", "1", "1.5", "1e308", "1e400", "-1e400", "NaN", "Infinity", "1" + "0" * 30,
    "1" + "0" * 400, "1" + "0" * 5000, '""', '"x"', '"\\ud800"', '"\\u0000"', '"../../outside"', '"/etc/passwd"',
    '"a\\nb"', '"auto"', "[]", "{}", "[[]]", "[null]", '{"a": 1}', '{"": {}}', "[1, 2, 3]", "2147483648", "100000000",
    "65536", "[" * 60 + "]" * 60, "[" * 3000 + "]" * 3000, '{"a":' * 500 + "1" + "}" * 500, '"' + "x" * 100_000 + '"',
    "[" + "0," * 10_000 + "0]",
)  # fmt: skip
_ROOTS = ("null", "true", "3", '"text"', "[]", "{}", "[{}]", '{"x": null}', "\ufeff{}", "{} {}", "NaN", "[" * 100_000)


def _root(path: Path, dice: random.Random) -> None:
    path.write_text(dice.choice(_ROOTS))


def _places(body: Any) -> list[tuple[Any, Any]]:
    """Every container with every key of it, those near the root more than once."""
    found: list[tuple[Any, Any]] = []

    def visit(value: Any, depth: int) -> None:
        keys: Any = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in list(keys)[:200]:
            found.extend([(value, key)] * max(1, 8 - 3 * depth))
            visit(value[key], depth + 1)

    visit(body, 0)
    return found


def _put(body: Any, dice: random.Random) -> str:
    """JSON text with a hostile value somewhere."""
    places = _places(body)
    if not places:
        return dice.choice(HOSTILE)
    mark = "\u2603here\u2603"
    owner, key = dice.choice(places)
    owner[key] = mark
    return json.dumps(body).replace(json.dumps(mark), dice.choice(HOSTILE), 1)


def _value(path: Path, dice: random.Random) -> None:
    path.write_text(_put(json.loads(path.read_text()), dice))


def _removed(path: Path, dice: random.Random) -> None:
    body = json.loads(path.read_text())
    owner, key = dice.choice(_places(body) or [({"x": 1}, "x")])
    del owner[key]
    path.write_text(json.dumps(body))


def _renamed(path: Path, dice: random.Random) -> None:
    body = json.loads(path.read_text())
    owner, key = dice.choice([place for place in _places(body) if isinstance(place[0], dict)] or [({"x": 1}, "x")])
    owner[dice.choice(("", "x", "../x", "\u2603", "a\nb", f"{key}x", "__proto__"))] = owner.pop(key)
    path.write_text(json.dumps(body))


def _swapped(path: Path, dice: random.Random) -> None:
    body = json.loads(path.read_text())
    places = _places(body) or [({"x": 1}, "x")]
    (owner, key), (other, name) = dice.choice(places), dice.choice(places)
    owner[key], other[name] = json.loads(json.dumps(other[name])), json.loads(json.dumps(owner[key]))
    path.write_text(json.dumps(body))


def _another(path: Path, dice: random.Random) -> None:
    """Another small file of the run, the repository or the source."""
    work = next(parent for parent in path.parents if (parent / "config.yaml").is_file())
    others = [each for each in work.rglob("*.json") if each.is_file() and each != path]
    shutil.copyfile(dice.choice(sorted(others)), path)


JSON = (
    *(Mutation("a value", _value) for _ in range(14)),
    *(Mutation("a key less", _removed) for _ in range(3)),
    *(Mutation("a key renamed", _renamed) for _ in range(2)),
    *(Mutation("two values swapped", _swapped) for _ in range(2)),
    *(Mutation("another root", _root) for _ in range(3)),
    Mutation("another file", _another),
    *ANY,
)

# Lines ---------------------------------------------------------------------------------------------------------------


def _line(path: Path, dice: random.Random) -> None:
    lines = path.read_text().splitlines()
    place = dice.randrange(len(lines))
    lines[place] = _put(json.loads(lines[place]), dice)
    path.write_text("\n".join(lines) + "\n")


def _lines_mixed(path: Path, dice: random.Random) -> None:
    lines = path.read_text().splitlines()
    dice.shuffle(lines)
    path.write_text("\n".join(lines[: dice.randrange(len(lines))]) + "\n")


EVENTS = (
    *(Mutation("a value of a line", _line) for _ in range(10)),
    *(Mutation("lines mixed", _lines_mixed) for _ in range(3)),
    *(Mutation("cut", _cut) for _ in range(3)),
    *ANY,
)

# Tensors -------------------------------------------------------------------------------------------------------------


def _header(change: Callable[[dict[str, Any], random.Random], str | None]) -> Change:
    """Change a header and keep the data; the length before it is right."""

    def apply(path: Path, dice: random.Random) -> None:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        body = json.loads(data[8 : 8 + length])
        text = (change(body, dice) or json.dumps(body)).encode(errors="surrogatepass")
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        _consistent(path)

    return apply


def _consistent(path: Path) -> None:
    """Where a manifest says what a file has, it says so of the changed one."""
    import hashlib

    manifest = path.parent / "prismaquant.json"
    if manifest.is_file():
        body = json.loads(manifest.read_text())
        body["files"][path.name] = path.stat().st_size
        body["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(body))


def _tensor(body: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = body[dice.choice(sorted(body.keys() - {"__metadata__"}))]
    return found


def _overlap(body: dict[str, Any], dice: random.Random) -> None:
    _tensor(body, dice)["data_offsets"] = _tensor(body, dice)["data_offsets"]


def _dtype(body: dict[str, Any], dice: random.Random) -> None:
    entry = _tensor(body, dice)
    twins = {"BF16": ("F16", "I16"), "F8_E4M3": ("U8", "F8_E5M2", "I8"), "U8": ("F8_E4M3", "I8"), "F32": ("I32", "I32")}
    entry["dtype"] = dice.choice((*twins.get(entry["dtype"], ("I64",)), "F8_E8M0", "C64"))


def _shape(body: dict[str, Any], dice: random.Random) -> None:
    entry = _tensor(body, dice)
    shape = entry["shape"]
    turned = (shape[::-1], [1, *shape], [*shape, 1], [0], [1 << 40, *shape], [-1 * size for size in shape])
    entry["shape"] = dice.choice(turned)


def _names(body: dict[str, Any], dice: random.Random) -> None:
    one, other = _tensor(body, dice), _tensor(body, dice)
    one["dtype"], other["dtype"] = other["dtype"], one["dtype"]
    one["shape"], other["shape"] = other["shape"], one["shape"]
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


def _renamed_tensor(body: dict[str, Any], dice: random.Random) -> None:
    name = dice.choice(sorted(body.keys() - {"__metadata__"}))
    leaf = dice.choice(("weight_shape", "weight_scale", "weight_global_scale", "input_global_scale", "../x", "", "\n"))
    body[f"{name.rpartition('.')[0]}.{leaf}"] = body.pop(name)


def _data(suffixes: tuple[str, ...], fills: tuple[bytes, ...]) -> Change:
    """Other bytes in a tensor, if there is one whose name ends so."""

    def apply(path: Path, dice: random.Random) -> None:
        data = bytearray(path.read_bytes())
        (length,) = struct.unpack("<Q", data[:8])
        body = json.loads(data[8 : 8 + length])
        names = sorted(name for name in body.keys() - {"__metadata__"} if name.endswith(suffixes))
        if names:
            start, stop = body[dice.choice(names)]["data_offsets"]
            fill = dice.choice(fills)
            data[8 + length + start : 8 + length + stop] = (fill * (stop - start))[: stop - start]
        path.write_bytes(data)
        _consistent(path)

    return apply


def _length(path: Path, dice: random.Random) -> None:
    data = path.read_bytes()
    length = dice.choice((0, 1, 1 << 63, (1 << 64) - 1, 100_000_000, len(data)))
    path.write_bytes(struct.pack("<Q", length) + data[8:])


_NAN = (b"\xff", b"\x7f", b"\x00\x00\xc0\x7f", b"\xc0\x7f", b"\x00", b"\x00\x00\x80\x7f", b"\x80")
_SCALES = ("_scale", "_scale_inv", "norm.weight")
TENSORS = (
    *(Mutation("a scale that is none", _data(_SCALES, _NAN)) for _ in range(4)),
    *(Mutation("weights that are none", _data(("weight", "weight_packed"), _NAN)) for _ in range(2)),
    *(Mutation("offsets that overlap", _header(_overlap)) for _ in range(2)),
    *(Mutation("another dtype", _header(_dtype)) for _ in range(2)),
    *(Mutation("another shape", _header(_shape)) for _ in range(3)),
    *(Mutation("tensors with each other's names", _header(_names)) for _ in range(2)),
    *(Mutation("a tensor renamed", _header(_renamed_tensor)) for _ in range(2)),
    *(Mutation("a value of the header", _header(_put)) for _ in range(5)),
    Mutation("a length that is none", _length),
    *ANY,
)

# Settings ------------------------------------------------------------------------------------------------------------

# Each line is a list of nine of the one before.
_LAUGHS = "a0: &a0 x\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
_DOCUMENTS = (
    "[" * 5000, "{a: " * 3000, "- " * 2000, "&a [*a]", "a: &a {b: *a}",
    "!!python/object/apply:os.system [touch outside]", "!!python/name:os.system", "model: !!binary x",
    "? [a, b]\n: c", "? {a: b}\n: c", "a: 2024-13-45", "{}: 1", "\x00", "model: \"\\ud800\"", "%YAML 9.9\n---\n{}",
    "--- {}\n--- {}", "1", "null", "a: 1" + "0" * 5000, "a: .nan",
    _LAUGHS,
    "model: {source: " + "x" * 300_000 + "}", "=: 1", "<<: {a: 1}", "<<: [1]", "a: 1:2:3:4", "a: 0x", "a: 0b",
    "a: 0o9",
)  # fmt: skip


def _document(path: Path, dice: random.Random) -> None:
    path.write_text(dice.choice(_DOCUMENTS))


def _section(path: Path, dice: random.Random) -> None:
    """A hostile document inside the right one: JSON is YAML."""
    body = json.loads(path.read_text())
    owner, key = dice.choice(_places(body))
    owner[key] = "HERE"
    path.write_text(
        json.dumps(body).replace(
            '"HERE"', dice.choice((*HOSTILE, ".inf", ".nan", "!!python/name:os.system", "2024-13-45"))
        )
    )


YAML = (
    *(Mutation("another document", _document) for _ in range(8)),
    *(Mutation("a value", _section) for _ in range(10)),
    *ANY,
)

_KEYS = (
    "budget.bpp", "budget.bytes", "budget.vram", "budget.context", "budget.margin", "budget.sequences", "formats",
    "sweep", "model.source", "model.dtype", "model.revision", "calibration.text", "calibration.images",
    "calibration.sequences", "calibration.length", "calibration.holdout", "calibration.microbatch",
    "calibration.seed", "store.run", "store.output", "store", "cluster.workers", "cluster.threads", "cluster.memory",
    "cluster.timeout", "cluster.wait", "cluster.labels", "cluster.blocks_per_shard", "allocation.force",
    "allocation.floor", "allocation.limits.prefill", "allocation.mtp_weight", "rounding.scale_search.span",
    "rounding.scale_search.grid", "rounding.gptq.damping", "evaluation", "a.b.c", "", ".", "=",
)  # fmt: skip
_VALUES = (
    "", "null", "[]", "{}", "[[a]]", "[a]", "{a: b}", "inf", ".inf", ".nan", "1e400", "1.0e+400", "-1", "0", "1e-300",
    "1e300", "9" * 30, "9" * 400, "9" * 5000, "true", "auto", "s3://", "s3://b/../x", "gs:/x", "hf://x", "file://",
    "/dev/zero", "/dev/null", "/", ".", "..", "~", "'a\\0b'", '"a\\0b"', '"\\ud800"', "x" * 5000, "a/" * 3000,
    "[" * 3000, "{a: " * 2000, "&a [*a]", "!!python/name:os.system", "2024-13-45", "%", "@", "`", "1.2.3GB",
    "9e999GB", "99999999999999TB", "100%", "-5%", "0x", "[1, 2]", "[0.5, 1.5, 2]", "[NVFP4, NVFP4]", "[BF16]",
    "[{match: '[', format: NVFP4}]", "[{match: x, format: [a]}]",
)  # fmt: skip


def _setting(path: Path | None, dice: random.Random) -> tuple[str, ...]:
    return (f"{dice.choice(_KEYS)}={dice.choice(_VALUES)}",)


OVERRIDES = (Mutation("", _setting),)
