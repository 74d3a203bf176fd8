"""Whole jobs in the formats that are off by default: prices in their order, plans, a verified repository."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from prismaquant_ray.formats import FormatName
from prismaquant_ray.repository.verify import verify_repository
from prismaquant_ray.repository.writer import write_repository
from prismaquant_ray.storage.store import Store
from tests.repositories import mixed
from tests.runs import configuration, measured
from tests.tiny import make_checkpoint

pytestmark = pytest.mark.slow
F = FormatName


def test_a_whole_job_in_every_format_prices_writes_and_verifies_it(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", hidden=128, intermediate=256, head_dim=64, layers=4)
    run = measured(configuration(tmp_path, source, f"formats=[{', '.join(F)}]", bpp=5.0))
    known = run.measured()
    groups = [known.backward[block.index].groups[group.name] for block in run.layout.blocks for group in block.groups]
    total = {name: math.fsum(group[name].cost for group in groups) for name in F if name is not F.BF16}
    assert all(0 < cost < math.inf for cost in total.values())
    assert total[F.INT3A16] > total[F.INT4] > total[F.INT6A16] > total[F.INT8A16], "bits of integers"
    # Eight bits of activations cost less than four, and more than none.
    assert total[F.MXFP4] > total[F.MXFP4A8] > math.fsum(group[F.MXFP4].weight_cost for group in groups)
    assert total[F.INT4A8] < total[F.NVFP4] and total[F.INT4A8] > total[F.INT6A16]
    assert max(total[name] for name in (F.FP8_BLOCK, F.FP8, F.INT8)) < total[F.INT4]
    kept = (F.NVFP4A16, F.INT3A16, F.INT4, F.INT6A16, F.INT8A16)
    assert all((group[name].activation_cost == 0) == (name in kept) for group in groups for name in total)
    choice = mixed(run.layout, tuple(F))
    assert len(set(choice.values())) >= 10
    shipped = known.shipped(choice)
    output = Store(tmp_path / "mixed")
    write_repository(shipped, run.layout, choice, known.candidates, output, manifest={"target": "mixed"})
    assert not verify_repository(output, shipped, run.layout, choice, known.candidates).problems
