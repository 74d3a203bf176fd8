"""Every stage as a function from a configuration to a typed result; progress goes to listeners as events."""

from __future__ import annotations

import time
from dataclasses import dataclass

from jobs.pipeline.assembly import AssembledRepository, assemble
from jobs.pipeline.measured import Measured
from jobs.pipeline.measured_sweep import load_evaluation_text, measure_plan, measure_sweep
from jobs.pipeline.refinement import chosen_plan
from jobs.pipeline.run import Run
from jobs.pipeline.workers import OpenWorkers, ray_workers
from prismaquant_ray.calibration.reading import GivenText
from prismaquant_ray.config import Config
from prismaquant_ray.events import Listener
from prismaquant_ray.records import MeasuredPlans, SweepRecord
from prismaquant_ray.report.summary import ProbeSummary, summarize_probe


@dataclass(frozen=True, kw_only=True, slots=True)
class Seconds:
    """Wall time of the parts of `quantize`, in seconds."""

    measure: float
    evaluate: float
    plan_and_assemble: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """Results of all stages of `quantize`; `evaluation` is None if the configuration names no text."""

    probe: ProbeSummary
    sweep: SweepRecord
    repository: AssembledRepository
    source_bytes: int
    evaluation: MeasuredPlans | None
    seconds: Seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredSweep(SweepRecord):
    """A sweep with the measured losses of its plans and baselines."""

    measured: MeasuredPlans


def quantize(
    config: Config,
    *,
    text: GivenText | None = None,
    evaluation_text: GivenText | None = None,
    fresh: bool = False,
    on_event: Listener | None = None,
    open_workers: OpenWorkers = ray_workers,
) -> Quantized:
    """Every stage, from the source to a verified repository; run again, it continues.

    `text` and `evaluation_text` are rows in place of the configured sources of text: texts, or mappings as the lines of
    a `.jsonl` (docs/calibration.md). `fresh` deletes the contents of `store.run` and starts over. `on_event` is called
    with every event.

    Raises:
        InputError: the configuration, the model or the calibration data cannot be used.
        ResourceError: the machine or the cluster cannot do it now; run it again to continue.
        StoreError: the run store cannot be reached or trusted.
    """
    started = time.monotonic()
    run = Run(
        config,
        text=text,
        evaluation_text=evaluation_text,
        fresh=fresh,
        on_event=on_event,
        open_workers=open_workers,
    )
    config = run.config
    run.check()
    if config.evaluation is not None:
        load_evaluation_text(run)
    with run.claimed():
        run.measure()
        measured = time.monotonic()
        plan = run.repairing(lambda known: chosen_plan(run, known))
        # Before the repository, so that its card has the figures.
        evaluation = None if config.evaluation is None else run.repairing(lambda known: measure_plan(run, known, plan))
        evaluated = time.monotonic()

        def finish(known: Measured) -> tuple[ProbeSummary, SweepRecord, AssembledRepository]:
            return summarize_probe(known.data), known.sweep, assemble(run, known, plan)

        probe, sweep, repository = run.repairing(finish)
    return Quantized(
        probe=probe,
        sweep=sweep,
        repository=repository,
        source_bytes=sum(info.nbytes for info in run.source.stored.values()),
        evaluation=evaluation,
        seconds=Seconds(
            measure=measured - started,
            evaluate=evaluated - measured,
            plan_and_assemble=time.monotonic() - evaluated,
        ),
    )


def sweep_and_measure(run: Run) -> MeasuredSweep:
    """The sweep, with measured losses of every plan and baseline."""
    load_evaluation_text(run)

    def both(known: Measured) -> MeasuredSweep:
        swept = known.sweep
        measured = measure_sweep(run, known)
        return MeasuredSweep(targets=swept.targets, out_of_reach=swept.out_of_reach, knee=swept.knee, measured=measured)

    return run.repairing(both)
