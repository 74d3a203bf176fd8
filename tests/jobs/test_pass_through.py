"""An FP8 source through FP8_BLOCK, end to end: bytes, prices, KL, verification."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.pipeline.measured import Measured
from jobs.pipeline.repository_evaluation import evaluate
from jobs.pipeline.run import Run
from prismaquant_ray.formats import FormatName
from prismaquant_ray.repository.verify import verify_repository
from prismaquant_ray.repository.writer import write_repository
from prismaquant_ray.storage.store import Store
from tests.inprocess import in_process
from tests.repositories import rewrite, tensors_of
from tests.runs import configuration, measured
from tests.tiny import make_text
from tests.tiny_families import make_family

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A measured run of a tiny DeepSeek-V3 with FP8 blocks, also in a format that inputs are equalized for."""
    directory = tmp_path_factory.mktemp("run")
    source = make_family(directory / "source", "deepseek_v3_fp8", **SIZES)
    return measured(configuration(directory, source, "formats=[NVFP4, FP8_BLOCK, BF16]"))


def written(run: Run, directory: Path) -> tuple[Path, Measured]:
    """The repository with every group in FP8_BLOCK, verified."""
    known = run.measured()
    choice = dict.fromkeys((group.name for group in run.layout.groups), FormatName.FP8_BLOCK)
    shipped = known.shipped(choice)
    write_repository(shipped, run.layout, choice, known.candidates, Store(directory), manifest={"target": "x"})
    return directory, known


def problems(run: Run, directory: Path, known: Measured, *, compared: bool = True) -> tuple[str, ...]:
    choice = dict.fromkeys((group.name for group in run.layout.groups), FormatName.FP8_BLOCK)
    candidates = known.candidates if compared else None
    return verify_repository(Store(directory), known.shipped(choice), run.layout, choice, candidates).problems


def test_an_fp8_source_passes_through_bit_for_bit_at_no_price_of_weights(run: Run, tmp_path: Path) -> None:
    directory, known = written(run, tmp_path / "repository")
    assert not problems(run, directory, known)
    ours, theirs = tensors_of(directory), tensors_of(Path(run.config.model.source))
    passed = 0
    for linear in run.layout.linears():
        for module, name in zip(linear.names, linear.sources, strict=True):
            assert torch.equal(raw(ours[f"{module}.weight"]), raw(theirs[name])), module
            assert torch.equal(ours[f"{module}.weight_scale"], theirs[f"{name}_scale_inv"]), module
            passed += 1
    assert passed == sum(name.endswith("_scale_inv") and "kv_b" not in name for name in theirs)
    prices = [known.backward[block.index].groups[group.name] for block in run.layout.blocks for group in block.groups]
    for price in prices:
        assert price[FormatName.FP8_BLOCK].weight_cost == 0 < price[FormatName.FP8_BLOCK].activation_cost
        assert price[FormatName.FP8_BLOCK].cost == pytest.approx(price[FormatName.FP8_BLOCK].activation_cost)
        assert price[FormatName.NVFP4].weight_cost > 0
    assert not any(record.folds for record in known.forward.values()), "factors would need other scales"


def test_weights_that_passed_through_have_no_kl_and_their_activations_have_some(run: Run, tmp_path: Path) -> None:
    directory, _ = written(run, tmp_path / "repository")
    text = make_text(tmp_path, 4000, seed=9)
    found = evaluate(str(directory), run.config.model.source, text, sequences=3, length=24, open_workers=in_process())
    assert found.weights.kl_mean == 0
    assert found.activations.kl_mean > 0
    assert found.formats["FP8_BLOCK"] == sum(len(linear.names) for linear in run.layout.linears())


def test_verify_finds_other_codes_and_scales_than_the_sources(run: Run, tmp_path: Path) -> None:
    directory, known = written(run, tmp_path / "repository")
    module = next(iter(run.layout.linears())).names[0]
    weight, scale = (tensors_of(directory)[f"{module}.{suffix}"] for suffix in ("weight", "weight_scale"))
    flipped = weight.view(torch.uint8).clone()
    flipped[3, 5] ^= 1
    for name, tensor in ((f"{module}.weight", flipped.view(weight.dtype)), (f"{module}.weight_scale", scale * 2)):
        rewrite(directory, {name: tensor})
        # Without the stored candidates, too.
        found = problems(run, directory, known, compared=False)
        assert any(f"{module} does not have the codes and scales of" in problem for problem in found)
        rewrite(directory, {f"{module}.weight": weight, f"{module}.weight_scale": scale})
    assert not any("codes and scales" in problem for problem in problems(run, directory, known))


def raw(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)
