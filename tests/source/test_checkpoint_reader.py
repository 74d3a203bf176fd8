"""The reader trusts nothing about a file it did not write, and reads what is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from prismaquant_ray.errors import InputError
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.files import INDEX
from prismaquant_ray.source.header import MAX_HEADER, build_header, header_length, parse_header
from prismaquant_ray.storage.store import Store
from tests.pieces import bytes_of

Body = dict[str, Any]
TENSORS = {
    "a.table": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.bias": torch.arange(3, dtype=torch.float32),
    "gate.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(6, dtype=torch.float32).to(torch.bfloat16).reshape(2, 3),
    "b.scale": torch.arange(4, dtype=torch.uint8).view(torch.float8_e5m2),
    "empty": torch.empty(0, 5),
    "scalar": torch.tensor(3, dtype=torch.int64),
}


def file_of(body: Any, data: bytes = bytes(64)) -> bytes:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, *, dtype: Any = "F32", shape: Any = None) -> Body:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def open_file(directory: Path, data: bytes, name: str = "model.safetensors") -> Checkpoint:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / name).write_bytes(data)
    return Checkpoint(Store(directory))


def with_index(directory: Path, weight_map: Any, *files: str) -> Checkpoint:
    (directory / "config.json").write_text("{}")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for file in files:
        save_file({f"{file[0]}.weight": torch.ones(4)}, directory / file)
    return Checkpoint(Store(directory))


def test_tensors_come_back_bit_for_bit_including_empty_ones(tmp_path: Path) -> None:
    checkpoint = open_file(tmp_path, save(TENSORS))
    found = checkpoint.read(TENSORS)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
        assert len(bytes_of(checkpoint, name)) == tensor.nbytes


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (0, 4)])
def test_a_matrix_of_32_bits_is_read_as_bf16(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    checkpoint = open_file(tmp_path, save({"a.weight": stored}))
    assert checkpoint.tensors["a.weight"].dtype == "BF16"
    assert checkpoint.stored["a.weight"].dtype == "F32"
    assert torch.equal(checkpoint.read(["a.weight"])["a.weight"], stored.bfloat16())
    assert bytes_of(checkpoint, "a.weight") == stored.bfloat16().view(torch.uint8).numpy().tobytes()
    holder, info = checkpoint.piece("a.weight")
    for start in range(0, info.nbytes, 3):
        stop = min(start + 5, info.nbytes)
        (part,) = holder.get_ranges(info.file, [(start, stop)])
        assert bytes(part) == bytes_of(checkpoint, "a.weight")[start:stop]


ATTACKS: dict[str, tuple[bytes, str]] = {
    "overlap": (file_of({"a": entry(0, 32), "b": entry(28, 64, shape=[9])}), "overlap or gap"),
    "same bytes twice": (file_of({"a": entry(0, 64), "b": entry(0, 64)}), "overlap or gap"),
    "gap": (file_of({"a": entry(0, 28), "b": entry(32, 64)}), "overlap or gap"),
    "gap at the start": (file_of({"a": entry(4, 64)}), "overlap or gap"),
    "cut short": (file_of({"a": entry(0, 64)}, bytes(63)), "cut short or padded"),
    "bytes left over": (file_of({"a": entry(0, 64)}, bytes(65)), "cut short or padded"),
    "offsets beyond the file": (file_of({"a": entry(0, 1 << 40)}), "cut short or padded"),
    "shape larger than its bytes": (file_of({"a": entry(0, 64, shape=[17])}), "64 bytes for shape"),
    "shape that overflows 64 bits": (file_of({"a": entry(0, 64, shape=[1 << 62, 1 << 62])}), "64 bytes for shape"),
    "negative shape": (file_of({"a": entry(0, 64, shape=[-4, -4])}), "shape"),
    "negative offset": (file_of({"a": entry(-64, 0, shape=[16])}), "offsets"),
    "stop before start": (file_of({"a": entry(64, 0, shape=[16])}), "bytes for shape"),
    "fractional shape": (file_of({"a": entry(0, 64, shape=[16.0])}), "shape"),
    "boolean shape": (file_of({"a": entry(0, 4, shape=[True])}, bytes(4)), "shape"),
    "text as shape": (file_of({"a": entry(0, 64, shape="16")}), "shape"),
    "unknown dtype": (file_of({"a": entry(0, 64, dtype="F8_E8M0")}), "dtype 'F8_E8M0'"),
    "list as dtype": (file_of({"a": entry(0, 64, dtype=["F32"])}), "dtype"),
    "wrong dtype for the size": (file_of({"a": entry(0, 64, dtype="BF16")}), "64 bytes for shape"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [16]}}), "malformed"),
    "three offsets": (file_of({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64, 64]}}), "malformed"),
    "entry is a number": (file_of({"a": 5}), "malformed"),
    "header is a list": (file_of([1, 2]), "not a JSON object"),
    "header is not JSON": (file_of(b"{'a': 1}"), "not JSON"),
    "header is not text": (file_of(b"\xff\xfe\x00{}"), "not JSON"),
    "header nested too deep": (file_of(b"[" * 200_000), "nested deeper than 64 levels"),
    "same name twice": (
        file_of(
            b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' + json.dumps({"a": entry(0, 64)}).encode()[1:]
        ),
        "a name twice in one object",
    ),
    "empty file": (b"", "not a safetensors file"),
    "seven bytes": (bytes(7), "not a safetensors file"),
    "header length of zero": (bytes(72), "header of 0 bytes"),
    "header longer than the file": ((1 << 20).to_bytes(8, "little") + bytes(64), "cut short or not safetensors"),
    "header of 2**64 - 1 bytes": (b"\xff" * 72, "cut short or not safetensors"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malformed_file_is_refused_by_name(attack: str, tmp_path: Path) -> None:
    data, message = ATTACKS[attack]
    with pytest.raises(InputError, match=message) as caught:
        open_file(tmp_path, data)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_huge_header_is_refused_before_it_is_read() -> None:
    with pytest.raises(InputError, match="header of"):
        header_length((MAX_HEADER + 1).to_bytes(8, "little"), "file", 1 << 50)
    assert header_length(MAX_HEADER.to_bytes(8, "little"), "file", 1 << 50) == MAX_HEADER


@given(st.integers(0, len(save(TENSORS)) - 1))
def test_every_truncation_is_noticed(length: int) -> None:
    data = save(TENSORS)[:length]
    with pytest.raises(InputError):
        size = header_length(data[:8], "file", len(data))
        parse_header(data[8 : 8 + size], "file", len(data))


@given(
    st.lists(
        st.tuples(st.sampled_from(["U8", "BF16", "F32"]), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
        max_size=6,
    )
)
def test_a_built_header_parses_back_to_the_same_tensors(specs: list[tuple[str, tuple[int, ...]]]) -> None:
    width = {"U8": 1, "BF16": 2, "F32": 4}
    entries = {}
    for index, (dtype, shape) in enumerate(specs):
        entries[f"tensor.{index}"] = (dtype, shape, width[dtype] * int(torch.Size(shape).numel()))
    header = build_header(entries)
    size = len(header) + sum(nbytes for _, _, nbytes in entries.values())
    infos = parse_header(header[8:], "file", size)
    assert len(header) % 8 == 0
    assert {info.name: (info.dtype, info.shape, info.nbytes) for info in infos} == entries


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/secret.safetensors", "sub/a.safetensors", "..\\a.safetensors", "config.json"],
)
def test_an_index_cannot_name_files_elsewhere(file: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "secret.safetensors")
    repository = tmp_path / "repository"
    repository.mkdir()
    with pytest.raises(InputError, match=r"only .safetensors files beside it"):
        with_index(repository, {"a": file})


def test_an_index_must_agree_with_the_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"places b.weight in a.safetensors, which does not hold it"):
        with_index(tmp_path, {"a.weight": "a.safetensors", "b.weight": "a.safetensors"}, "a.safetensors")
    with pytest.raises(InputError, match=r"c\.safetensors is in .* but not there"):
        with_index(tmp_path, {"a.weight": "a.safetensors", "c.weight": "c.safetensors"}, "a.safetensors")
    with pytest.raises(InputError, match=r"places a.weight in b.safetensors"):
        weight_map = {"a.weight": "b.safetensors", "b.weight": "a.safetensors"}
        with_index(tmp_path, weight_map, "a.safetensors", "b.safetensors")
    for broken in (None, [], {"a.weight": 3}):
        with pytest.raises(InputError, match="no weight_map"):
            with_index(tmp_path, broken)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"b.weight": torch.ones(4), "a.weight": torch.ones(4)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"a.weight is in both a\.safetensors and b\.safetensors"):
        with_index(tmp_path, {"a.weight": "a.safetensors", "b.weight": "b.safetensors"}, "a.safetensors")


def _no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def _config_is_a_list(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def _config_is_cut(directory: Path) -> None:
    (directory / "config.json").write_text('{"a": ')


def _no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_config, "no config.json"),
        (_config_is_a_list, "not a JSON object"),
        (_config_is_cut, "not JSON"),
        (_no_weights, "neither model.safetensors nor"),
    ],
)
def test_a_directory_that_is_no_model_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    open_file(tmp_path, save(TENSORS))
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        Checkpoint(Store(tmp_path))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tensor c.weight is missing"):
        open_file(tmp_path, save(TENSORS)).read(["a.table", "c.weight"])


def test_weights_in_other_files_are_not_other_files(tmp_path: Path) -> None:
    checkpoint = open_file(tmp_path, save(TENSORS))
    others = ["tokenizer.json", "LICENSE", ".gitattributes", "tokenizer.model"]
    copies = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "model.gguf"]
    for name in [*others, *copies]:
        (tmp_path / name).write_text("x")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "params.json").write_text("x")
    assert checkpoint.other_files() == sorted([*others, "config.json"])


def test_the_fingerprint_sees_one_changed_weight_and_not_how_the_model_is_cut(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(100_000), "b.weight": torch.zeros(7)}
    whole = open_file(tmp_path / "whole", save(tensors)).fingerprint()
    split = tmp_path / "split"
    split.mkdir()
    for name, tensor in tensors.items():
        save_file({name: tensor}, split / f"{name[0]}.safetensors")
    assert with_index(split, {name: f"{name[0]}.safetensors" for name in tensors}).fingerprint() == whole
    tensors["b.weight"][3] = 1
    assert open_file(tmp_path / "changed", save(tensors)).fingerprint() != whole
