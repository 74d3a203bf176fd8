"""Weights stored as FP8 in blocks are seen as the BF16 they stand for, whole or in ranges, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from prismaquant_ray.errors import InputError, StoreError
from prismaquant_ray.source.block_fp8 import BlockFp8Decoder
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.files import INDEX
from prismaquant_ray.source.header import as_tensor
from prismaquant_ray.source.ranges import read_pieces
from prismaquant_ray.storage.store import Store
from tests.pieces import bytes_of
from tests.tiny_families import dequantize_blocks, make_family

Scheme = dict[str, Any]
FP8 = torch.float8_e4m3fn
# Every code but NaN.
CODES = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8).view(FP8)


def scheme(rows: int, columns: int, **changes: Any) -> Scheme:
    block = [rows, columns]
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block} | changes


def codes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(CODES), shape, generator=generator)
    return CODES.view(torch.uint8)[picked].view(FP8)


def scales(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 1e-3 + 1e-5


def grid(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def save(directory: Path, *files: dict[str, Tensor], config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, tensors in enumerate(files):
        save_file(tensors, directory / f"{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{number}.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def open_weight(directory: Path, weight: Tensor, scale: Tensor, block: Sequence[int]) -> Checkpoint:
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale}
    return Checkpoint(Store(save(directory, tensors, config={"quantization_config": scheme(*block)})))


def by_loop(weight: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
    """One weight at a time, as the format describes it."""
    found = torch.empty(weight.shape, dtype=torch.bfloat16)
    wide = weight.float()
    for *matrix, row, column in product(*map(range, weight.shape)):
        factor = scale[(*matrix, row // block[0], column // block[1])].float()
        found[(*matrix, row, column)] = (wide[(*matrix, row, column)] * factor).to(torch.bfloat16)
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, tuple[int, int]]:
    sizes = st.integers(1, 9)
    shape = (*draw(st.lists(st.integers(1, 3), max_size=1)), draw(sizes), draw(sizes))
    block = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    seed = draw(st.integers(0, 1000))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return codes(*shape, seed=seed), scales(*grid(shape, block), seed=seed).to(dtype), block


@given(cases(), st.data())
def test_a_weight_and_every_range_of_it_are_what_a_loop_over_its_blocks_gives(
    case: tuple[Tensor, Tensor, tuple[int, int]], data: st.DataObject
) -> None:
    weight, scale, block = case
    expected = by_loop(weight, scale, block)
    with TemporaryDirectory() as directory:
        checkpoint = open_weight(Path(directory), weight, scale, block)
        found = checkpoint.read(["a.weight"])["a.weight"]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
        raw = bytes_of(checkpoint, "a.weight")
        assert raw == expected.view(torch.uint8).numpy().tobytes()
        size = len(raw)
        spans = data.draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, size + 3)), max_size=4))
        holder, info = checkpoint.piece("a.weight")
        ranges = holder.get_ranges(info.file, spans)
        assert [bytes(memoryview(part)) for part in ranges] == [raw[start:stop] for start, stop in spans]


def test_every_code_decodes_as_torch_decodes_it_nan_included(tmp_path: Path) -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(FP8).reshape(16, 16)
    found = open_weight(tmp_path, weight, torch.ones(1, 1), (128, 128)).read(["a.weight"])["a.weight"]
    torch.testing.assert_close(found, weight.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_large_weights_are_decoded_in_several_steps(tmp_path: Path) -> None:
    weight, scale = codes(1300, 1100), scales(11, 9)
    checkpoint = open_weight(tmp_path, weight, scale, (128, 128))
    expected = dequantize_blocks(weight, scale).to(torch.bfloat16)
    assert torch.equal(checkpoint.read(["a.weight"])["a.weight"], expected)


def test_transformers_decodes_the_same(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = codes(256, 384), scales(2, 3)
    operation = Fp8Dequantize(None)
    theirs = operation._dequantize_one(weight, scale, output_dtype=torch.bfloat16)
    assert torch.equal(open_weight(tmp_path, weight, scale, (128, 128)).read(["a.weight"])["a.weight"], theirs)


class Recorded(Store):
    """Notes what is asked of it."""

    def __init__(self, uri: Path) -> None:
        super().__init__(uri)
        self.asked: list[tuple[str, int]] = []

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Any:
        self.asked.append((key, sum(stop - start for start, stop in ranges)))
        return super().get_ranges(key, ranges)


def test_some_rows_cost_the_bytes_of_these_rows_and_of_their_scales(tmp_path: Path) -> None:
    open_weight(tmp_path, codes(512, 256), scales(4, 2), (128, 128))
    store = Recorded(tmp_path)
    holder, info = Checkpoint(store).piece("a.weight")
    store.asked.clear()
    holder.get_ranges(info.file, [(2 * 256 * 130, 2 * 256 * 140)])
    assert store.asked == [("0.safetensors", 10 * 256 + 2 * 4)]


def test_weights_and_scales_of_a_file_are_one_request(tmp_path: Path) -> None:
    tensors = {f"{name}.weight": codes(8, 8, seed=index) for index, name in enumerate("abc")}
    kept = {"norm.weight": torch.ones(4, dtype=torch.bfloat16)}
    every = tensors | {f"{name}_scale_inv": scales(2, 2) for name in tensors} | kept
    store = Recorded(save(tmp_path, every, config={"quantization_config": scheme(4, 4)}))
    checkpoint = Checkpoint(store)
    store.asked.clear()
    assert checkpoint.read([*tensors, *kept]).keys() == {*tensors, *kept}
    assert store.asked == [("0.safetensors", 3 * (64 + 16) + 8)]


def test_a_weight_may_lie_in_another_file_than_its_scales(tmp_path: Path) -> None:
    weights = [codes(5, 7, seed=seed) for seed in range(2)]
    factors = [scales(3, 2, seed=seed) for seed in range(2)]
    first = {"a.weight": weights[0], "b.weight_scale_inv": factors[1]}
    second = {"a.weight_scale_inv": factors[0], "b.weight": weights[1], "c": torch.ones(3)}
    store = Recorded(save(tmp_path, first, second, config={"quantization_config": scheme(2, 4)}))
    checkpoint = Checkpoint(store)
    expected = {
        name: by_loop(*pair, (2, 4)) for name, *pair in zip(("a.weight", "b.weight"), weights, factors, strict=True)
    }
    store.asked.clear()
    found = checkpoint.read(["a.weight", "b.weight", "c", "a.weight"])
    assert len(store.asked) == 2
    assert found.keys() == {"a.weight", "b.weight", "c"}
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert bytes_of(checkpoint, name) == tensor.view(torch.uint8).numpy().tobytes()


def test_the_view_is_a_bf16_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint(Store(make_family(tmp_path, "deepseek_v3_fp8")))
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.source_config == {
        **checkpoint.config,
        "quantization_config": checkpoint.source_config["quantization_config"],
    }
    decoded = [name for name, info in checkpoint.stored.items() if info.dtype == "F8_E4M3"]
    assert decoded
    assert not [name for name in checkpoint.tensors if name.endswith("_scale_inv")]
    assert {*checkpoint.tensors, *(f"{name}_scale_inv" for name in decoded)} == set(checkpoint.stored)
    order = list(checkpoint.stored)
    assert list(checkpoint.tensors) == sorted(checkpoint.tensors, key=order.index)
    for name in decoded:
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape) == ("BF16", checkpoint.stored[name].shape)
        assert info.nbytes == 2 * checkpoint.stored[name].nbytes
    found = checkpoint.read(checkpoint.tensors)
    pieces = read_pieces((checkpoint.piece(name) for name in checkpoint.tensors), batch_bytes=1 << 16)
    for (info, data), name in zip(pieces, checkpoint.tensors, strict=True):
        assert info == checkpoint.tensors[name]
        assert torch.equal(as_tensor(data, info.dtype, info.shape), found[name])
    stored = {name: as_tensor(*_stored(checkpoint, name)) for name in checkpoint.stored}
    for name in decoded:
        expected = dequantize_blocks(stored[name], stored[f"{name}_scale_inv"]).to(torch.bfloat16)
        assert torch.equal(found[name], expected)


def _stored(checkpoint: Checkpoint, name: str) -> tuple[object, str, tuple[int, ...]]:
    info = checkpoint.stored[name]
    return checkpoint.store.get_ranges(info.file, [(info.start, info.stop)])[0], info.dtype, info.shape


def test_scales_are_no_tensors_and_only_weights_can_be_asked_of_the_decoder(tmp_path: Path) -> None:
    checkpoint = open_weight(tmp_path, codes(4, 4), scales(1, 1), (128, 128))
    for ask in (checkpoint.piece, lambda name: checkpoint.read([name])):
        with pytest.raises(InputError, match=r"tensor a\.weight_scale_inv is missing"):
            ask("a.weight_scale_inv")
    with pytest.raises(KeyError):
        BlockFp8Decoder(checkpoint.store, {}).get_ranges("a.weight", [(0, 1)])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_weight_stays_empty(shape: tuple[int, int], tmp_path: Path) -> None:
    checkpoint = open_weight(tmp_path, torch.empty(shape).to(FP8), torch.empty(grid(shape, (2, 2))), (2, 2))
    assert checkpoint.read(["a.weight"])["a.weight"].shape == shape
    assert bytes_of(checkpoint, "a.weight") == b""


def test_a_text_models_scheme_is_taken_out_of_its_part_of_the_configuration(tmp_path: Path) -> None:
    tensors = {"a.weight": codes(4, 4), "a.weight_scale_inv": scales(1, 1)}
    config = {"model_type": "x", "text_config": {"hidden_size": 4, "quantization_config": scheme(128, 128)}}
    checkpoint = Checkpoint(Store(save(tmp_path, tensors, config=config)))
    assert checkpoint.config == {"model_type": "x", "text_config": {"hidden_size": 4}}
    assert checkpoint.source_config == config
    assert checkpoint.tensors["a.weight"].dtype == "BF16"


def test_another_scheme_is_left_as_it_is_for_others_to_refuse(tmp_path: Path) -> None:
    tensors = {"a.weight": codes(4, 4), "a.weight_scale": torch.ones(4, 1)}
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    checkpoint = Checkpoint(Store(save(tmp_path, tensors, config=config)))
    assert checkpoint.config == config
    assert checkpoint.tensors == checkpoint.stored
    assert checkpoint.read(["a.weight"])["a.weight"].dtype == FP8


def test_the_fingerprint_covers_scales_and_the_scheme(tmp_path: Path) -> None:
    weight, scale = codes(8, 8), scales(4, 4)
    whole = open_weight(tmp_path / "a", weight, scale, (2, 2)).fingerprint()
    assert open_weight(tmp_path / "b", weight, scale, (2, 2)).fingerprint() == whole
    changed = scale.clone()
    changed[3, 3] *= 2
    assert open_weight(tmp_path / "c", weight, changed, (2, 2)).fingerprint() != whole
    config = {"quantization_config": scheme(2, 2, scale_fmt="ue8m0")}
    other = save(tmp_path / "d", {"a.weight": weight, "a.weight_scale_inv": scale}, config=config)
    assert Checkpoint(Store(other)).fingerprint() != whole


REFUSED: dict[str, tuple[dict[str, Tensor], Any, str]] = {
    "no scheme": ({"a.weight": codes(4, 4)}, None, r"a\.weight is F8_E4M3, but config\.json has no"),
    "no scales": ({"a.weight": codes(4, 4)}, scheme(2, 2), r"a\.weight in 0.* without a tensor a\.weight_scale_inv"),
    "no weight": ({"a.weight_scale_inv": scales(2, 2)}, scheme(2, 2), r"a\.weight_scale_inv in 0.* has no F8_E4M3"),
    "a weight in BF16": (
        {"a.weight": torch.ones(4, 4, dtype=torch.bfloat16), "a.weight_scale_inv": scales(2, 2)},
        scheme(2, 2),
        r"a\.weight_scale_inv in 0.* has no F8_E4M3",
    ),
    "scales of other blocks": (
        {"a.weight": codes(4, 4), "a.weight_scale_inv": scales(2, 2)},
        scheme(128, 128),
        r"a\.weight_scale_inv has shape \(2, 2\), \(1, 1\) expected",
    ),
    "scales rounded down": (
        {"a.weight": codes(5, 4), "a.weight_scale_inv": scales(2, 2)},
        scheme(2, 2),
        r"has shape \(2, 2\), \(3, 2\) expected",
    ),
    "scales of one matrix": (
        {"a.weight": codes(3, 4, 4), "a.weight_scale_inv": scales(2, 2)},
        scheme(2, 2),
        r"has shape \(2, 2\), \(3, 2, 2\) expected",
    ),
    "scales as codes": (
        {"a.weight": codes(4, 4), "a.weight_scale_inv": torch.ones(2, 2, dtype=torch.uint8)},
        scheme(2, 2),
        "with U8 scales is not FP8 in blocks",
    ),
    "a vector": (
        {"a.weight": codes(4), "a.weight_scale_inv": scales(2)},
        scheme(2, 2),
        r"of shape \(4,\) with F32 scales is not FP8 in blocks",
    ),
    "E5M2": ({"a": torch.ones(2)}, scheme(2, 2, fmt="e5m2"), "fmt 'e5m2' in config.json; only 'e4m3'"),
    "static inputs": (
        {"a": torch.ones(2)},
        scheme(2, 2, activation_scheme="static"),
        "'static' in config.json; only 'dynamic'",
    ),
}
BLOCKS: tuple[Any, ...] = (None, [128], [128, 128, 128], [0, 128], [-1, 128], [128.0, 128], [True, 128], "128", 128, {})
REFUSED |= {
    f"blocks of {block}": ({"a": torch.ones(2)}, scheme(2, 2, weight_block_size=block), "with weight_block_size")
    for block in BLOCKS
}
REFUSED["no blocks"] = ({"a": torch.ones(2)}, {"quant_method": "fp8"}, "with weight_block_size None")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_decoded_is_refused_when_opened(case: str, tmp_path: Path) -> None:
    tensors, described, message = REFUSED[case]
    save(tmp_path, tensors, config={} if described is None else {"quantization_config": described})
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint(Store(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("read", [lambda c: c.read(["a.weight"]), lambda c: bytes_of(c, "a.weight")])
def test_scales_that_are_not_finite_are_refused_when_read(
    value: float, read: Callable[[Checkpoint], Any], tmp_path: Path
) -> None:
    scale = scales(2, 2)
    scale[1, 0] = value
    checkpoint = open_weight(tmp_path, codes(4, 4), scale, (2, 2))
    with pytest.raises(InputError, match=r"a\.weight_scale_inv is not finite; fetch 0\.safetensors again"):
        read(checkpoint)


def test_a_file_that_was_cut_after_opening_is_named(tmp_path: Path) -> None:
    checkpoint = open_weight(tmp_path, codes(64, 64), scales(1, 1), (128, 128))
    info = checkpoint.stored["a.weight"]
    scaled = checkpoint._scaled["a.weight"]
    with pytest.raises(StoreError, match=r"0\.safetensors is shorter than its header says, at a\.weight$"):
        scaled.decode(0, 64, bytes(info.nbytes - 1), bytes(4), checkpoint.store.uri)
    with pytest.raises(StoreError, match=r"at a\.weight_scale_inv$"):
        scaled.decode(0, 64, bytes(info.nbytes), bytes(3), checkpoint.store.uri)
