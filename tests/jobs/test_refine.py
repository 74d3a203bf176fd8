"""Claims about choosing by measurement: what teaches does not judge, and a plan that is not better is not used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.pipeline import refinement
from jobs.pipeline.evaluation import EvaluationSession
from jobs.pipeline.refinement import chosen_plan
from jobs.pipeline.run import Run
from jobs.pipeline.stages import quantize
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.events import Event, Notice
from prismaquant_ray.parsing import parse_object
from prismaquant_ray.records import Refinement, refinement_key
from prismaquant_ray.serialization import from_bytes
from prismaquant_ray.storage.store import Store
from tests.inprocess import in_process
from tests.runs import configuration
from tests.tiny import make_checkpoint

SETTINGS = ("rounding.gptq=null", "rounding.scale_search.grid=4", "allocation.refine=3")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    directory = tmp_path_factory.mktemp("refine")
    source = make_checkpoint(directory / "source", "llama", layers=4)
    return configuration(directory, source, *SETTINGS, bpp=6.5, evaluation=True)


def found(config: Config) -> Refinement:
    return from_bytes(Refinement, Store(config.store.run).get(refinement_key(config.budget.target)))


def test_a_run_measures_judges_and_ships_what_it_chose(config: Config) -> None:
    told: list[Event] = []
    result = quantize(config, on_event=told.append, open_workers=in_process())
    refined = found(config)
    assert 2 <= refined.plans <= 4
    assert {name.split()[1] for name in refined.gains} == {"NVFP4", "MXFP8"}
    assert refined.kept == (refined.change < 0)
    assert any(isinstance(event, Notice) and event.message.startswith("refined by") for event in told)
    manifest = parse_object((Path(config.store.output) / "prismaquant.json").read_bytes())
    run = Run(config, open_workers=in_process())
    plan = run.repairing(lambda known: chosen_plan(run, known))
    assert manifest["choice"] == plan.choice
    assert result.evaluation is not None
    assert [entry.choice for entry in result.evaluation.plans] == [plan.choice]
    base = run.measured().plan
    assert (plan.choice == base.choice) == (not refined.kept or refined.groups_changed == 0)
    assert plan.weight_bytes <= 6.5 * run.measured().sizes.parameters / 8


@pytest.mark.parametrize("better", [True, False])
def test_only_what_is_better_on_the_other_half_is_used(
    config: Config, better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are made up: sequences that teach praise FP8's kind of plan, those that judge may not."""
    run = Run(config, open_workers=in_process())
    known = run.measured()
    base = known.plan

    def tokens(session: EvaluationSession, variant: object) -> dict[str, torch.Tensor]:
        choice = variant.choice  # type: ignore[attr-defined]
        small = sum(name == "NVFP4" for group, name in choice.items() if group.endswith("down_proj"))
        sequence = torch.arange(4).repeat_interleave(5)
        teaching = 1.0 + small + 0.01 * torch.randn(20, generator=torch.Generator().manual_seed(small))
        judging = 1.0 + (small if better else -small) + torch.zeros(20)
        return {"sequence": sequence, "kl": torch.where(sequence % 2 == 0, teaching, judging)}

    monkeypatch.setattr(EvaluationSession, "measure", lambda *_: [])
    monkeypatch.setattr(EvaluationSession, "tokens_of", tokens)
    plan = refinement.chosen_plan(run, known)
    judged = found(config)
    assert judged.groups_changed > 0
    assert judged.kept == better
    assert (plan.choice != base.choice) == better
    assert judged.gains["down_proj NVFP4"] > judged.gains["down_proj MXFP8"]


def test_half_of_nothing_teaches_nothing(config: Config) -> None:
    assert config.evaluation is not None
    few = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"sequences": 3})})
    run = Run(few, open_workers=in_process())
    with pytest.raises(InputError, match="give at least 4"):
        chosen_plan(run, run.measured())
