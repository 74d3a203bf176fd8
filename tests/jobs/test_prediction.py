"""What a plan is said to cost is what it costs: the predicted loss against the KL divergence of the model served."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.pipeline.measured_sweep import measure_sweep
from tests.runs import configuration, measured
from tests.trained import make_trained


@pytest.mark.slow
def test_of_a_trained_model_the_predicted_loss_is_the_measured_divergence_within_a_factor_of_two(
    tmp_path: Path,
) -> None:
    more = ("calibration.sequences=32", "evaluation.sequences=24", "evaluation.length=32")
    source = make_trained(tmp_path / "source")
    config = configuration(tmp_path, source, *more, characters=20_000, sweep=(4.6, 5.5, 7.0), evaluation=True)
    run = measured(config)
    result = measure_sweep(run, run.measured())
    plans = [entry for entry in result.plans if entry.kind == "plan"]
    assert [plan.target for plan in plans] == ["4.6bpp", "5.5bpp", "7bpp"]
    ratios = [plan.predicted_loss / plan.activations.kl_mean for plan in plans]
    assert all(0.5 < ratio < 2 for ratio in ratios), ratios
