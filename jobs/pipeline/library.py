"""The stages of a run for Python: `prismaquant_ray` exports these names, and docs/api.md describes them.

Nothing is printed. `on_event` is called with every `prismaquant_ray.Event`, on the calling thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from jobs.pipeline import assembly, recipes, stages
from jobs.pipeline.assembly import AssembledRepository, verify
from jobs.pipeline.dequantizing import dequantize
from jobs.pipeline.inspection import inspect
from jobs.pipeline.measured import Measured
from jobs.pipeline.recipes import ExportedRecipe
from jobs.pipeline.reporting import WrittenReport, report
from jobs.pipeline.repository_evaluation import evaluate
from jobs.pipeline.run import Run
from jobs.pipeline.stages import MeasuredSweep, quantize
from jobs.pipeline.workers import OpenWorkers, ray_workers
from prismaquant_ray.allocation.problem import AllocationProblem
from prismaquant_ray.backward.cost_table import CostTable
from prismaquant_ray.calibration.reading import GivenText
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError
from prismaquant_ray.events import Listener
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import formats_of
from prismaquant_ray.layout import Layout
from prismaquant_ray.records import PlanRecord, SweepRecord
from prismaquant_ray.report.explanation import Explanation, explain
from prismaquant_ray.report.findings import Findings
from prismaquant_ray.report.summary import ProbeSummary, summarize_probe
from prismaquant_ray.repository.recipes import Tool
from prismaquant_ray.settings.budget import BudgetConfig
from prismaquant_ray.source.protocol import TensorSource

__all__ = ["OpenRun", "dequantize", "evaluate", "inspect", "open_run", "quantize", "verify"]


def open_run(
    config: Config,
    *,
    text: GivenText | None = None,
    evaluation_text: GivenText | None = None,
    fresh: bool = False,
    on_event: Listener | None = None,
) -> OpenRun:
    """The run of a configuration; it may be measured already.

    `text` and `evaluation_text` are rows in place of the configured sources: texts, or mappings as the lines of a
    `.jsonl`. The run is known by what they hold, so the same rows continue it.

    Raises:
        InputError: the model cannot be opened.
    """
    return OpenRun(config, text=text, evaluation_text=evaluation_text, fresh=fresh, on_event=on_event)


class OpenRun:
    """One configuration over one run store. Every method measures what is missing first, and only once."""

    def __init__(
        self,
        config: Config,
        *,
        text: GivenText | None = None,
        evaluation_text: GivenText | None = None,
        fresh: bool = False,
        on_event: Listener | None = None,
        open_workers: OpenWorkers = ray_workers,
    ) -> None:
        self._run = Run(
            config,
            text=text,
            evaluation_text=evaluation_text,
            fresh=fresh,
            on_event=on_event,
            open_workers=open_workers,
        )

    @property
    def config(self) -> Config:
        """The configuration."""
        return self._run.config

    @property
    def layout(self) -> Layout:
        """The model as the quantizer sees it: blocks, fused groups, Linears. Nothing is measured for it."""
        return self._run.layout

    def measure(self) -> ProbeSummary:
        """Both passes: candidates of every group in every format, and their prices."""
        return self._run.repairing(lambda known: summarize_probe(known.data))

    def prices(self) -> CostTable:
        """The loss that every fused group costs in every format, in nats per token."""
        return self._run.repairing(lambda known: known.planner.table)

    def problem(self) -> AllocationProblem:
        """Prices, and bytes of codes and scales, for `solve` and `frontier` or for an allocator of one's own."""
        return self._run.repairing(lambda known: known.planner.problem(BudgetConfig(bpp=1.0)))

    def candidate(self, group: str, format: FormatName | str) -> dict[str, Tensor]:  # noqa: A002 - as in quantize_weight
        """The tensors that a fused group ships in a format, by name; none in BF16, where those of `shipped` ship.

        Raises:
            InputError: there is no such group, or it has no candidate in this format.
        """
        return self._run.repairing(lambda known: _candidate(known, group, format))

    def shipped(self, choice: Mapping[str, FormatName]) -> TensorSource:
        """The source as a choice of formats ships it: with the factors that equalized the inputs of its candidates."""
        return self._run.repairing(lambda known: known.shipped(choice))

    def plan(self, budget: BudgetConfig | None = None) -> PlanRecord:
        """The plan for a budget, by default the configured one. Nothing is run again for another budget.

        Raises:
            InputError: no plan has that size; the message has both bounds.
        """
        return self._run.repairing(lambda known: known.plan if budget is None else known.planner.plan_for(budget))

    def plan_of(self, choice: Mapping[str, FormatName], name: str) -> PlanRecord:
        """The plan that gives each fused group its format in `choice`; `assemble` and `findings` take it like others.

        It is shown under `name`, where other plans have their budget. Its `gap` is to the best plan of as many bytes.

        Raises:
            InputError: a group has no format, or one that it cannot take.
        """
        return self._run.repairing(lambda known: known.planner.plan_of(choice, name))

    def sweep(self) -> SweepRecord:
        """A plan for every target of the configured sweep, and the knee of the frontier."""
        return self._run.repairing(lambda known: known.sweep)

    def measure_sweep(self) -> MeasuredSweep:
        """The sweep, with the measured loss of every plan and of its baselines."""
        return stages.sweep_and_measure(self._run)

    def assemble(self, plan: PlanRecord | None = None, output: Path | str | None = None) -> AssembledRepository:
        """Write and verify the repository of a plan at `output`; both default to the configured ones."""
        self._run.check()
        with self._run.claimed():
            return self._run.repairing(
                lambda known: assembly.assemble(self._run, known, known.plan if plan is None else plan, output)
            )

    def export_recipe(
        self, out: Path | str, plan: PlanRecord | None = None, tools: Sequence[Tool] = tuple(Tool)
    ) -> ExportedRecipe:
        """A plan, by default the configured one, as files for other quantizers in `out`, a directory or URI.

        `recipe.yaml` is for llm-compressor, `modelopt.yaml` for ModelOpt. Only the choice of formats travels.

        Raises:
            InputError: a tool does not have a format, or cannot name a part of the model.
        """
        return self._run.repairing(
            lambda known: recipes.export_recipe(known, known.plan if plan is None else plan, str(out), tools)
        )

    def findings(self, plan: PlanRecord | None = None) -> Findings:
        """The findings that report and card are made from."""
        return self._run.repairing(lambda known: known.findings(known.plan if plan is None else plan))

    def explain(self, name: str) -> Explanation:
        """Why a module has its format in the configured plan, or why it cannot be quantized.

        Raises:
            InputError: there is no such module.
        """
        return self._run.repairing(lambda known: explain(known.planner, known.plan, name))

    def report(self, out: str | None = None) -> WrittenReport:
        """The report as a page, JSON and plots, below `report/` of the run store or in `out`."""
        return report(self._run, out=out)


def _candidate(known: Measured, name: str, format_name: FormatName | str) -> dict[str, Tensor]:
    group = next((group for group in known.layout.groups if group.name == name), None)
    if group is None or format_name not in formats_of(group, known.config.formats):
        raise InputError(f"there is no group {name} with candidates in {format_name}")
    chosen, block = FormatName(format_name), known.layout.block_of[name].index
    if FORMATS[chosen].codec is None:
        return {}
    known.candidates.check([(block, chosen)])
    return known.candidates.read(block, chosen, group)
