"""The verifier sees each thing that would make a runtime serve something else than was chosen."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.forward.candidates import Candidates
from prismaquant_ray.repository.manifest import MANIFEST
from prismaquant_ray.repository.verify import verify_repository
from prismaquant_ray.source.files import INDEX
from prismaquant_ray.storage.store import Store
from tests.repositories import (
    SEVEN,
    Choice,
    Model,
    make_model,
    mixed,
    mixed_choice,
    rewrite,
    shards,
    tensors_of,
)
from tests.tiny_families import FAMILIES

F = FormatName
LAYER = "model.layers."
# What is damaged below, by the format it has.
PLAN = {
    f"{LAYER}0.self_attn.qkv_proj": F.NVFP4,
    f"{LAYER}0.self_attn.o_proj": F.MXFP8,
    f"{LAYER}0.mlp.gate_up_proj": F.NVFP4A16,
    f"{LAYER}0.mlp.down_proj": F.FP8,
    f"{LAYER}1.self_attn.qkv_proj": F.INT4,
    f"{LAYER}1.self_attn.o_proj": F.NVFP4,
    f"{LAYER}1.mlp.gate_up_proj": F.MXFP4,
    f"{LAYER}1.mlp.down_proj": F.BF16,
}
Q, K = f"{LAYER}0.self_attn.q_proj", f"{LAYER}0.self_attn.k_proj"
MX8, FP8 = f"{LAYER}0.self_attn.o_proj", f"{LAYER}0.mlp.down_proj"
INT4, MX4, BF16 = f"{LAYER}1.self_attn.v_proj", f"{LAYER}1.mlp.up_proj", f"{LAYER}1.mlp.down_proj"
NORM = "model.norm.weight"


@dataclass(frozen=True)
class Written:
    """A right repository, to be copied and damaged."""

    model: Model
    path: Path
    choice: Choice

    def copy(self, path: Path) -> Path:
        return Path(shutil.copytree(self.path, path / "copy"))

    def problems(self, path: Path, *, stored: bool = True) -> tuple[str, ...]:
        return self.model.verify(path, self.choice, stored=stored).problems


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    directory = tmp_path_factory.mktemp("verify")
    model = make_model(directory, "llama_untied")
    model.write(directory / "out", PLAN, shard=40_000)
    return Written(model, directory / "out", PLAN)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def filled(tensor: Tensor, position: int, byte: int) -> Tensor:
    """A copy with one byte replaced."""
    data = tensor.contiguous().view(-1).view(torch.uint8).clone()
    data[position] = byte
    return data.view(tensor.dtype).view(tensor.shape)


# Nothing wrong --------------------------------------------------------------------------------------------------


def test_a_repository_as_written_has_no_problems_and_its_figures_are_right(written: Written) -> None:
    report = written.model.verify(written.path, PLAN)
    assert report.ok, report.problems
    assert report.tensors == len(tensors_of(written.path))
    assert report.linears == {F.NVFP4: 4, F.MXFP8: 1, F.NVFP4A16: 2, F.FP8: 1, F.INT4: 3, F.MXFP4: 2, F.BF16: 1}
    assert report.total_bytes == sum(file.stat().st_size for file in written.path.iterdir())
    manifest = json.loads((written.path / MANIFEST).read_text())
    assert (report.bpp, report.bits_all_parameters) == (manifest["bpp"], manifest["bits_all_parameters"])
    assert written.model.verify(written.path, PLAN, stored=False).ok


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_plan_of_every_family_is_right(
    family: str, tmp_path: Path, family_models: Callable[[str], Model]
) -> None:
    model = family_models(family)
    choice = mixed(model.layout)
    model.write(tmp_path, choice, shard=100_000)
    report = model.verify(tmp_path, choice)
    assert report.ok, report.problems
    assert report.tensors == len(tensors_of(tmp_path))
    by_format = [name for group in model.layout.groups for name in [choice[group.name]] * len(group.linears)]
    assert report.linears == {name: by_format.count(name) for name in FORMATS if name in by_format}
    assert model.verify(tmp_path, choice, stored=False).ok


# Every format twice and every model, of those that differ in what a plan of one format has to say of them.
UNIFORM = [
    *zip(SEVEN, itertools.cycle(("llama", "qwen2", "gemma2")), strict=False),
    *zip(FormatName, itertools.cycle(("qwen3_moe", "deepseek_v3_fp8", "qwen3_5_moe", "gpt_oss")), strict=False),
]


@pytest.mark.parametrize(("name", "architecture"), UNIFORM)
def test_a_plan_of_one_format_wherever_a_model_can_take_it_is_right(
    name: FormatName, architecture: str, tmp_path: Path, family_models: Callable[[str], Model]
) -> None:
    model = family_models(architecture)
    choice = {group.name: formats_of(group, (name, F.BF16))[0] for group in model.layout.groups}
    model.write(tmp_path, choice)
    report = model.verify(tmp_path, choice)
    assert report.ok, report.problems
    assert report.linears.get(name, 0) > 0


def test_a_model_card_written_later_is_no_problem(written: Written, tmp_path: Path) -> None:
    path = written.copy(tmp_path)
    (path / "README.md").write_text("# card")
    (path / "report.html").write_text("<html>")
    assert written.problems(path) == ()


# Tensors: damage → what is said about it. The repository stays consistent in everything else. -------------------


def _removed(tensor: Tensor) -> None:
    """Instead of a changed tensor."""


TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "missing scale": (f"{Q}.weight_scale", _removed, f"tensor {Q}.weight_scale is missing"),
    "missing input scale": (f"{Q}.input_global_scale", _removed, "input_global_scale is missing"),
    "missing norm": (NORM, _removed, f"tensor {NORM} is missing"),
    "0-d scalar": (f"{Q}.weight_global_scale", lambda t: t.reshape(()), "is F32 (); F32 (1,) expected"),
    "1-D scale": (f"{FP8}.weight_scale", lambda t: t.flatten(), "is BF16 (64,); BF16 (64, 1) expected"),
    "scale as bytes": (f"{Q}.weight_scale", lambda t: t.view(torch.uint8), "is U8 (64, 4); F8_E4M3"),
    "F32 scale": (f"{FP8}.weight_scale", lambda t: t.float(), "is F32 (64, 1); BF16"),
    "transposed weight": (f"{FP8}.weight", lambda t: t.view(torch.uint8).T.contiguous().view(t.dtype), "expected"),
    "widened norm": (NORM, lambda t: t.float(), f"{NORM} is F32 (64,); BF16 (64,) expected"),
    "E4M3 NaN": (f"{Q}.weight_scale", lambda t: filled(t, 5, 0x7F), "zero, negative, infinite or NaN"),
    "E4M3 zero": (f"{Q}.weight_scale", lambda t: filled(t, 5, 0), "zero, negative, infinite or NaN"),
    "E4M3 negative": (f"{Q}.weight_scale", lambda t: filled(t, 5, 0xB8), "zero, negative, infinite or NaN"),
    "E8M0 NaN": (f"{MX8}.weight_scale", lambda t: filled(t, 3, 255), "zero, negative, infinite or NaN"),
    "E8M0 zero": (f"{MX4}.weight_scale", lambda t: filled(t, 3, 0), "zero, negative, infinite or NaN"),
    "BF16 zero": (f"{FP8}.weight_scale", lambda t: t * 0, "zero, negative, infinite or NaN"),
    "BF16 infinity": (f"{INT4}.weight_scale", lambda t: t / 0, "zero, negative, infinite or NaN"),
    "divisor zero": (f"{Q}.weight_global_scale", lambda t: t * 0, "it must be finite and above zero"),
    "divisor NaN": (f"{Q}.weight_global_scale", lambda t: t * float("nan"), "it must be finite and above zero"),
    "divisor negative": (f"{Q}.input_global_scale", lambda t: -t, "it must be finite and above zero"),
    "divisor infinite": (f"{Q}.input_global_scale", lambda t: t / 0, "it must be finite and above zero"),
    "divisor of 24 bits": (f"{Q}.weight_global_scale", lambda t: t * 1.001, "is not a BF16 value"),
    "divisor differs": (f"{Q}.weight_global_scale", lambda t: t * 2, "members have different weight_global_scale"),
    "input differs": (f"{Q}.input_global_scale", lambda t: t * 2, "members have different input_global_scale"),
    "other shape stated": (f"{INT4}.weight_shape", lambda t: t.flip(0), f"{INT4}.weight_shape is"),
    "weight NaN": (f"{MX8}.weight", lambda t: filled(t, 7, 0x7F), "decodes to NaN or infinite"),
    "codes changed": (f"{K}.weight_packed", lambda t: t ^ 1, "weight_packed not as in the stored candidate"),
    "one bit changed": (f"{MX4}.weight_packed", lambda t: filled(t, 9, int(t.view(-1)[9]) ^ 4), "decodes to other"),
    "scale doubled": (f"{MX8}.weight_scale", lambda t: t + 1, "weight_scale not as in the stored candidate"),
    "norm changed": (NORM, lambda t: t * 1.01, f"{NORM} is not the source's, byte for byte"),
    "zero negated": ("model.embed_tokens.weight", lambda t: filled(t, 1, int(t.view(torch.uint8)[0, 1]) ^ 128), "byte"),
    "BF16 weight changed": (f"{BF16}.weight", lambda t: t + 1, f"{BF16}.weight is not the source's"),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_a_damaged_tensor_is_reported(damage: str, written: Written, tmp_path: Path) -> None:
    name, change, message = TENSORS[damage]
    path = written.copy(tmp_path)
    rewrite(path, {name: change(tensors_of(path)[name])})
    problems = written.problems(path)
    assert any(message in problem for problem in problems), problems
    # Nothing else is blamed, but the bits per parameter where the size changed.
    place = name.rpartition(".")[0]
    assert all(place in problem or "qkv_proj" in problem or "states b" in problem for problem in problems), problems


@pytest.mark.parametrize(
    "extra",
    [
        f"{Q}.weight_zero_point",
        f"{MX8}.weight_packed",
        f"{Q}.weight",
        f"{LAYER}0.mlp.up_proj.input_global_scale",
        f"{BF16}.weight_scale",
        "model.extra",
    ],
)
def test_a_tensor_too_many_is_reported(extra: str, written: Written, tmp_path: Path) -> None:
    path = written.copy(tmp_path)
    rewrite(path, {extra: torch.ones(1)})
    assert f"tensor {extra} does not belong here; vLLM refuses tensors it does not know" in written.problems(path)


def test_divisors_are_compared_inside_fused_modules_only(written: Written, tmp_path: Path) -> None:
    tensors = tensors_of(written.path)
    assert not torch.equal(
        tensors[f"{Q}.weight_global_scale"], tensors[f"{LAYER}1.self_attn.o_proj.weight_global_scale"]
    )
    path = written.copy(tmp_path)
    members = [f"{LAYER}0.self_attn.{leaf}_proj.input_global_scale" for leaf in "qkv"]
    rewrite(path, {name: tensors[name] * 2 for name in members})
    problems = written.problems(path)
    assert not any("members have different" in problem for problem in problems)
    assert sum("input_global_scale not as in the stored candidate" in problem for problem in problems) == 3
    # Without the candidates this is a sound repository.
    assert written.problems(path, stored=False) == ()


# Experts: stored one by one in the source, or packed. ------------------------------------------------------------

EXPERTS = {
    "qwen3_moe": "model.layers.1.mlp.experts",
    "deepseek_v3_fp8": "model.layers.2.mlp.experts",
    "qwen3_5_moe": "model.language_model.layers.3.mlp.experts",
}


@pytest.fixture(scope="module", params=EXPERTS)
def routed(
    request: pytest.FixtureRequest, family_models: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Written, str]:
    """A right repository, and the name of experts that are NVFP4 in it; others are MXFP8 and BF16."""
    model, experts = family_models(request.param), EXPERTS[request.param]
    choice = mixed_choice(model.layout)
    blocks = [group.name for group in model.layout.groups if group.experts]
    choice |= {name: (F.NVFP4, F.MXFP8, F.BF16)[index % 3] for index, name in enumerate(reversed(blocks))}
    choice |= {experts: F.NVFP4}
    path = tmp_path_factory.mktemp("routed") / "out"
    model.write(path, choice, shard=100_000)
    assert model.verify(path, choice).ok
    return Written(model, path, choice), experts


EXPERT_TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "missing scale": ("7.up_proj.weight_scale", _removed, "tensor {}.7.up_proj.weight_scale is missing"),
    "missing codes": ("0.gate_proj.weight_packed", _removed, "tensor {}.0.gate_proj.weight_packed is missing"),
    "missing divisor": ("3.down_proj.weight_global_scale", _removed, "weight_global_scale is missing"),
    "gate and up differ": (
        "5.gate_proj.weight_global_scale",
        lambda t: t * 2,
        "{0}.5.gate_proj, {0}.5.up_proj: members have different weight_global_scale",
    ),
    "up and gate differ": (
        "7.up_proj.weight_global_scale",
        lambda t: t * 2,
        "{0}.7.gate_proj, {0}.7.up_proj: members have different weight_global_scale",
    ),
    "input of one expert": (
        "6.down_proj.input_global_scale",
        lambda t: t * 2,
        "{0}.0.down_proj, {0}.1.down_proj: members have different input_global_scale",
    ),
    "input of one projection": (
        "6.up_proj.input_global_scale",
        lambda t: t * 2,
        "members have different input_global_scale",
    ),
    "E4M3 NaN": ("2.down_proj.weight_scale", lambda t: filled(t, 5, 0x7F), "zero, negative, infinite or NaN"),
    "divisor zero": ("2.down_proj.weight_global_scale", lambda t: t * 0, "it must be finite and above zero"),
    "divisor of 24 bits": ("2.down_proj.weight_global_scale", lambda t: t * 1.001, "is not a BF16 value"),
    "codes changed": ("4.up_proj.weight_packed", lambda t: t ^ 1, "{}.4.up_proj: weight_packed not as in the stored"),
}


@pytest.mark.parametrize("damage", EXPERT_TENSORS)
def test_one_damaged_expert_is_reported(damage: str, routed: tuple[Written, str], tmp_path: Path) -> None:
    written, experts = routed
    leaf, change, message = EXPERT_TENSORS[damage]
    name = f"{experts}.{leaf}"
    path = written.copy(tmp_path)
    rewrite(path, {name: change(tensors_of(path)[name])})
    problems = written.problems(path)
    assert any(message.format(experts) in problem for problem in problems), problems
    # No other expert is blamed; which expert's input scale is the wrong one nobody can say.
    place = name.rpartition(".")[0]
    shared = f"{experts}.0." if "input" in leaf else place
    assert all(place in problem or shared in problem or "states b" in problem for problem in problems), problems


def test_experts_have_divisors_of_their_own_but_share_that_of_their_input(
    routed: tuple[Written, str], tmp_path: Path
) -> None:
    written, experts = routed
    tensors = tensors_of(written.path)
    first, last = (tensors[f"{experts}.{expert}.gate_proj.weight_global_scale"] for expert in (0, 7))
    assert not torch.equal(first, last)
    path = written.copy(tmp_path)
    # Consistent changes: both halves of one expert's matrix, and the input of every expert.
    changed = [f"{experts}.3.{leaf}_proj.weight_global_scale" for leaf in ("gate", "up")]
    changed += [f"{experts}.{expert}.down_proj.input_global_scale" for expert in range(8)]
    rewrite(path, {name: tensors[name] * 2 for name in changed})
    problems = written.problems(path)
    assert len(problems) == len(changed)
    assert all("not as in the stored candidate" in problem for problem in problems), problems
    # Without the candidates this is a sound repository.
    assert written.problems(path, stored=False) == ()


def test_exchanged_experts_are_reported(routed: tuple[Written, str], tmp_path: Path) -> None:
    written, experts = routed
    tensors = tensors_of(written.path)
    path = written.copy(tmp_path)
    own = {name.removeprefix(f"{experts}.1.") for name in tensors if name.startswith(f"{experts}.1.")}
    assert len(own) == 12
    rewrite(
        path,
        {f"{experts}.{a}.{leaf}": tensors[f"{experts}.{b}.{leaf}"] for a, b in ((1, 2), (2, 1)) for leaf in own},
    )
    problems = written.problems(path)
    for expert in (1, 2):
        for leaf in ("gate", "up", "down"):
            assert any(problem.startswith(f"{experts}.{expert}.{leaf}_proj: weight_packed") for problem in problems)


@pytest.mark.parametrize("leaf", ["8.up_proj.weight_packed", "gate_up_proj", "0.gate_proj.weight", "down_proj.weight"])
def test_an_expert_too_many_or_one_as_it_was_is_reported(
    leaf: str, routed: tuple[Written, str], tmp_path: Path
) -> None:
    written, experts = routed
    path = written.copy(tmp_path)
    rewrite(path, {f"{experts}.{leaf}": torch.ones(1)})
    assert f"tensor {experts}.{leaf} does not belong here; vLLM refuses tensors it does not know" in written.problems(
        path
    )


# Files ------------------------------------------------------------------------------------------------------------


def _swap_index(body: dict[str, Any]) -> None:
    files = sorted(set(body["weight_map"].values()))
    body["weight_map"][NORM] = next(file for file in files if file != body["weight_map"][NORM])


def _forget(body: dict[str, Any]) -> None:
    del body["weight_map"][NORM]


def _invent(body: dict[str, Any]) -> None:
    body["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"


def _total(body: dict[str, Any]) -> None:
    body["metadata"]["total_size"] += 1


def _no_map(body: dict[str, Any]) -> None:
    del body["weight_map"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap_index, f"places {NORM} in"),
        (_forget, f"{NORM} is in"),
        (_invent, "places model.extra in"),
        (_total, "states a total_size of"),
        (_no_map, "has no weight_map"),
    ],
)
def test_an_index_that_is_wrong_is_reported(
    change: Callable[[dict[str, Any]], None], message: str, written: Written, tmp_path: Path
) -> None:
    path = written.copy(tmp_path)
    edit(path / INDEX, change)
    assert any(message in problem for problem in written.problems(path))


@pytest.mark.parametrize("file", ["config.json", INDEX, MANIFEST, "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("damage", ["missing", "not JSON", "a list"])
def test_a_file_that_is_missing_or_damaged_is_reported(
    file: str, damage: str, written: Written, tmp_path: Path
) -> None:
    path = written.copy(tmp_path)
    if damage == "missing":
        (path / file).unlink()
    else:
        (path / file).write_text("{" if damage == "not JSON" else "[]")
    problems = written.problems(path)
    assert any(problem.startswith(file) for problem in problems), problems


@pytest.mark.parametrize("damage", ["removed", "cut", "garbage"])
def test_a_damaged_shard_is_reported_with_everything_it_held(damage: str, written: Written, tmp_path: Path) -> None:
    path = written.copy(tmp_path)
    file, held = next(iter(shards(path).items()))
    if damage == "removed":
        (path / file).unlink()
    elif damage == "cut":
        (path / file).write_bytes((path / file).read_bytes()[:-1])
    else:
        (path / file).write_bytes(b"garbage")
    problems = written.problems(path)
    assert {f"tensor {name} is missing" for name in held} <= set(problems)
    assert any(file in problem and ("cut" in problem or "not a safe" in problem) for problem in problems) or (
        damage == "removed"
    )


def test_a_tensor_in_two_shards_and_a_forgotten_file_are_reported(written: Written, tmp_path: Path) -> None:
    path = written.copy(tmp_path)
    save_file({NORM: tensors_of(path)[NORM], "other": torch.ones(1)}, path / "model-old.safetensors")
    problems = written.problems(path)
    assert any(f"{NORM} is in both" in problem for problem in problems)
    assert any("tensor other does not belong here" in problem for problem in problems)
    assert any("other is in model-old.safetensors but not in" in problem for problem in problems)


def test_a_changed_byte_that_no_other_check_covers_breaks_the_digest(written: Written, tmp_path: Path) -> None:
    path = written.copy(tmp_path)
    file = next(iter(shards(path)))
    save_file(load_file(path / file), path / file, {"format": "np", "note": "resaved"})
    assert any(f"{file} does not have the digest" in problem for problem in written.problems(path))


def _complete(body: dict[str, Any]) -> None:
    body["complete"] = False


def _choice(body: dict[str, Any]) -> None:
    body["choice"][f"{LAYER}0.mlp.down_proj"] = "BF16"


def _size(body: dict[str, Any]) -> None:
    body["files"]["tokenizer.json"] += 1


def _unknown_file(body: dict[str, Any]) -> None:
    body["files"]["vanished.txt"] = 3


def _digest(body: dict[str, Any]) -> None:
    body["sha256"] = dict.fromkeys(body["sha256"], "0" * 64)


def _no_digest(body: dict[str, Any]) -> None:
    del body["sha256"]


def _bpp(body: dict[str, Any]) -> None:
    body["bpp"] -= 0.001


def _bits(body: dict[str, Any]) -> None:
    del body["bits_all_parameters"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_complete, "writing did not end"),
        (_choice, "another choice"),
        (_size, "tokenizer.json has"),
        (_unknown_file, "vanished.txt has None bytes"),
        (_digest, "does not have the digest"),
        (_no_digest, "does not have the digest"),
        (_bpp, "states bpp"),
        (_bits, "states bits_all_parameters None"),
    ],
)
def test_a_manifest_that_is_wrong_is_reported(
    change: Callable[[dict[str, Any]], None], message: str, written: Written, tmp_path: Path
) -> None:
    path = written.copy(tmp_path)
    edit(path / MANIFEST, change)
    problems = written.problems(path)
    assert problems
    assert all(message in problem for problem in problems), problems


# Configuration ----------------------------------------------------------------------------------------------------


def group_of(config: dict[str, Any], format_name: str, *, activations: bool = True) -> dict[str, Any]:
    return next(
        entry
        for entry in config["quantization_config"]["config_groups"].values()
        if entry["format"] == format_name and bool(entry["input_activations"]) is activations
    )


def _unanchored(config: dict[str, Any]) -> None:
    group = group_of(config, "float-quantized")
    group["targets"] = [r"re:model\.layers\..*down_proj"]


def _class_target(config: dict[str, Any]) -> None:
    group_of(config, "float-quantized")["targets"] = ["Linear"]


def _swapped(config: dict[str, Any]) -> None:
    first, second = group_of(config, "float-quantized"), group_of(config, "mxfp8-quantized")
    first["targets"], second["targets"] = second["targets"], first["targets"]


def _overlap(config: dict[str, Any]) -> None:
    group_of(config, "float-quantized")["targets"].append(f"{LAYER}0.self_attn.o_proj")


def _fused_name(config: dict[str, Any]) -> None:
    group_of(config, "pack-quantized", activations=False)["targets"] = [f"{LAYER}1.self_attn.qkv_proj"]


def _member_lost(config: dict[str, Any]) -> None:
    group_of(config, "pack-quantized", activations=False)["targets"].pop()


def _member_ignored(config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].append(INT4)


def _not_ignored(config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].remove("lm_head")


def _embedding(config: dict[str, Any]) -> None:
    group_of(config, "float-quantized")["targets"].append("model.embed_tokens")


def _scale_dtype(config: dict[str, Any]) -> None:
    del group_of(config, "mxfp8-quantized")["weights"]["scale_dtype"]


def _dynamic(config: dict[str, Any]) -> None:
    group_of(config, "nvfp4-pack-quantized")["input_activations"]["dynamic"] = True


def _activations_lost(config: dict[str, Any]) -> None:
    group_of(config, "nvfp4-pack-quantized")["input_activations"] = None


def _status(config: dict[str, Any]) -> None:
    del config["quantization_config"]["quantization_status"]


def _group_format(config: dict[str, Any]) -> None:
    del group_of(config, "float-quantized")["format"]


def _absent(config: dict[str, Any]) -> None:
    del config["quantization_config"]


def _rope(config: dict[str, Any]) -> None:
    config["rope_parameters"] = {"rope_theta": 1.0, "rope_type": "default"}


def _dtype(config: dict[str, Any]) -> None:
    config["dtype"] = "float16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unanchored, f"{BF16} is not to be quantized, but a target of"),
        (_class_target, f"{FP8} is no target by name"),
        (_swapped, f"{FP8} gets group_"),
        (_overlap, f"{MX8} is a target of group_"),
        (_fused_name, f"{INT4} gets nothing from transformers"),
        (_member_lost, "vLLM needs one scheme"),
        (_member_ignored, "some members of model.layers.1.self_attn.qkv_proj are in `ignore`"),
        (_not_ignored, "lm_head is not quantized and not in `ignore`"),
        (_embedding, "model.embed_tokens is not to be quantized, but a target"),
        (_scale_dtype, f"{MX8} gets group_"),
        (_dynamic, f"{Q} gets group_"),
        (_activations_lost, f"{Q} gets group_"),
        (_status, "quantization_status is not compressed"),
        (_group_format, "no format of its own"),
        (_absent, "has no quantization_config"),
        (_rope, "differs from the source's in more than quantization_config"),
        (_dtype, "differs from the source's in more than quantization_config"),
    ],
)
def test_a_configuration_that_is_wrong_is_reported(
    change: Callable[[dict[str, Any]], None], message: str, written: Written, tmp_path: Path
) -> None:
    path = written.copy(tmp_path)
    edit(path / "config.json", change)
    problems = written.problems(path)
    assert any(message in problem for problem in problems), problems


# Configurations of families -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(family_models: Callable[[str], Model], tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Everything but the draft head in FP8: experts, vision tower, head."""
    model = family_models("qwen3_5_moe")
    choice = {group.name: F.BF16 if group.name.startswith("mtp.") else F.FP8 for group in model.layout.groups}
    path = tmp_path_factory.mktemp("seeing") / "out"
    model.write(path, choice)
    assert model.verify(path, choice).ok
    return Written(model, path, choice)


def _replaced(**parts: str) -> Callable[[dict[str, Any]], None]:
    """In every target and `ignore`, each of these patterns in place of another."""

    def change(config: dict[str, Any]) -> None:
        quantization = config["quantization_config"]
        lists = [quantization["ignore"], *(entry["targets"] for entry in quantization["config_groups"].values())]
        found = 0
        for targets in lists:
            for index, target in enumerate(targets):
                targets[index] = target.replace(parts["old"], parts["new"])
                found += targets[index] != target
        assert found

    return change


def _expert_ignored(config: dict[str, Any]) -> None:
    config["quantization_config"]["ignore"].append(r"re:^model\.language_model\.layers\.0\.mlp\.experts\.0\.up_proj$")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _replaced(old=r"(model\.language_model|language_model\.model|model)", new=r"model\.language_model"),
            "language_model.model.layers.0.linear_attn.in_proj_qkvz gets nothing from vLLM",
        ),
        (
            _replaced(old=r"(model\.language_model|language_model\.model|model)", new=r"language_model\.model"),
            "model.language_model.layers.0.linear_attn.in_proj_z gets nothing from transformers",
        ),
        (
            _replaced(old=r"(model\.visual|visual)", new=r"model\.visual"),
            "visual.blocks.0.attn.qkv gets nothing from vLLM",
        ),
        (
            _replaced(old=r"^(lm_head|language_model\.lm_head)$", new="^lm_head$"),
            "language_model.lm_head gets nothing from vLLM",
        ),
        (_replaced(old=r"experts\.\d+\.", new=r"experts\.0\."), "mlp.experts.1.gate_proj is no target by name"),
        (_replaced(old=r"experts\.\d+\.", new=r"experts\.[1-9]\."), "mlp.experts.0.gate_proj gets nothing from vLLM"),
        (
            _replaced(old="re:^(model", new="re:.*(mtp|model"),
            "mtp.layers.0.mlp.experts.0.up_proj is not to be quantized",
        ),
        (_expert_ignored, "get group_0, no group; vLLM needs one scheme for all of a layer's"),
    ],
)
def test_a_configuration_that_is_wrong_for_experts_towers_or_drafts_is_reported(
    change: Callable[[dict[str, Any]], None], message: str, seeing: Written, tmp_path: Path
) -> None:
    path = seeing.copy(tmp_path)
    edit(path / "config.json", change)
    problems = seeing.problems(path)
    assert any(message in problem for problem in problems), problems


def test_a_repository_of_another_plan_is_not_this_ones(written: Written) -> None:
    other: Choice = mixed(written.model.layout, (F.NVFP4, F.MXFP8))
    problems = written.model.verify(written.path, other).problems
    assert any("another choice of formats" in problem for problem in problems)
    assert any("is missing" in problem for problem in problems)
    assert any("gets group_" in problem for problem in problems)
    with pytest.raises(InputError, match="no format for"):
        written.model.verify(written.path, {})


# Candidates -------------------------------------------------------------------------------------------------------


def test_candidates_that_were_damaged_after_the_fact_are_reported(written: Written, tmp_path: Path) -> None:
    model = written.model
    store = Store(tmp_path)
    for artifact in model.candidates.artifacts.values():
        store.put(artifact.key, model.candidates.store.get(artifact.key))
    artifact = model.candidates.artifacts[0, F.FP8]
    data = bytearray(store.get(artifact.key))
    data[-1] ^= 1
    store.put(artifact.key, bytes(data))
    candidates = Candidates(store, model.candidates.artifacts)
    report = verify_repository(Store(written.path), model.source, model.layout, PLAN, candidates)
    assert any("another digest" in problem for problem in report.problems)
    artifacts = {key: value for key, value in model.candidates.artifacts.items() if key != (1, F.INT4)}
    report = verify_repository(Store(written.path), model.source, model.layout, PLAN, Candidates(store, artifacts))
    assert any("block 1 has no INT4 candidates" in problem for problem in report.problems)


def test_every_problem_is_one_line_and_all_are_collected(written: Written, tmp_path: Path) -> None:
    path = written.copy(tmp_path)
    tensors = tensors_of(path)
    rewrite(path, {NORM: tensors[NORM] + 1, f"{Q}.weight_scale": None, "model.extra": torch.ones(1)})
    (path / "tokenizer.json").unlink()
    edit(path / "config.json", _not_ignored)
    problems = written.problems(path)
    for part in (NORM, f"{Q}.weight_scale", "model.extra", "tokenizer.json", "lm_head", "bpp"):
        assert any(part in problem for problem in problems), part
    assert len(set(problems)) == len(problems)
    assert not any("\n" in problem for problem in problems)
