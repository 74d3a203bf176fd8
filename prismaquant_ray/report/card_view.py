"""A card's figures, from the findings of a run and the contents of its repository."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import BlockKind
from prismaquant_ray.report.findings import Findings, MeasuredLosses, PlanFindings
from prismaquant_ray.report.group_findings import FormatShare, Share
from prismaquant_ray.report.groups import decoded, predicted_loss, share
from prismaquant_ray.report.shipped import Shipped, ShippedFormat

# Budgets of a sweep that a card shows: this one and its neighbours.
_BUDGETS = 12
_VERSIONS = ("torch", "transformers", "compressed-tensors", "ray", "python")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCoverage:
    """Routed experts: layers, experts per layer, fewest calibration tokens, experts without tokens."""

    layers: int
    each: int
    fewest: int
    unseen: int


@dataclass(frozen=True, kw_only=True)
class CardView:
    """The figures of a card. Losses are nats per token, under `token_fisher` for any objective."""

    findings: Findings
    shipped: Shipped

    @property
    def versions(self) -> Iterator[tuple[str, str]]:
        """Installed packages and Python, with versions."""
        for name in _VERSIONS:
            found = self.findings.versions[name]
            if found is not None:
                yield "Python" if name == "python" else name, found

    # The plan -----------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> PlanFindings:
        """The plan that ships."""
        return self.findings.plan

    @cached_property
    def chosen(self) -> list[str]:
        """The format of every group."""
        return decoded(self.plan.choice, self.findings.formats)

    @cached_property
    def predicted(self) -> Share:
        """The predicted loss of its formats, with the parts of rounded weights and of activations by themselves."""
        return share(self.shipped.prices, range(len(self.chosen)), self.chosen)

    @property
    def measured(self) -> MeasuredLosses | None:
        """Measured losses of exactly this choice."""
        return self.measured_of(self.plan)

    # Formats ------------------------------------------------------------------------------------------------------

    @cached_property
    def formats(self) -> list[tuple[ShippedFormat, FormatShare, str]]:
        """Formats in use, with their contents and summaries."""
        shares = {entry.format: entry for entry in self.findings.composition.formats}
        summaries = {entry.name: entry.summary for entry in self.findings.formats}
        return [(entry, shares[entry.name], summaries[entry.name]) for entry in self.shipped.formats]

    @property
    def quantized(self) -> tuple[ShippedFormat, ...]:
        """Formats in use other than BF16."""
        return tuple(entry for entry in self.shipped.formats if entry.quantized)

    @property
    def waiting(self) -> list[str]:
        """Formats that load on some GPUs without activation rounding."""
        return [entry.name for entry in self.quantized if (entry.full_from or 0) > entry.loads_from]

    @property
    def widths(self) -> list[str]:
        """Columns that share a scale, with the format."""
        return [f"{entry.width} ({entry.name})" for entry in self.quantized if entry.width is not None]

    @property
    def expert_formats(self) -> list[str]:
        """Formats of experts that transformers does not compute correctly."""
        of_experts = {name for name, count in zip(self.chosen, self.findings.groups.experts, strict=True) if count}
        return [str(name) for name in FormatName if name in of_experts and not FORMATS[name].in_transformers]

    # Parts of the model -------------------------------------------------------------------------------------------

    @cached_property
    def experts(self) -> ExpertCoverage | None:
        """None without routed experts."""
        found = self.findings.experts
        if not found:
            return None
        return ExpertCoverage(
            layers=len(found),
            each=max(entry.experts for entry in found),
            fewest=min(entry.fewest for entry in found),
            unseen=sum(entry.unseen for entry in found),
        )

    @property
    def vision_blocks(self) -> int:
        """Number of blocks of the vision tower, without the merger."""
        return sum(block.kind == BlockKind.VISION for block in self.findings.blocks)

    @property
    def head(self) -> bool:
        """Whether the output head is quantized."""
        heads = {block.index for block in self.findings.blocks if block.kind == BlockKind.HEAD}
        groups = zip(self.findings.groups.block, self.chosen, strict=True)
        return any(block in heads and name != FormatName.BF16 for block, name in groups)

    @property
    def base_models(self) -> tuple[str, ...]:
        """Hub ids of the quantized model, if known."""
        source = self.shipped.source
        return (source.hub_id,) if source.hub_id else source.stated.quantized_from

    # The sweep ----------------------------------------------------------------------------------------------------

    @cached_property
    def sweep(self) -> list[PlanFindings]:
        """This plan and its neighbours in the sweep, by bits."""
        plans = sorted(self.findings.plans, key=lambda plan: (plan.bpp, plan is not self.plan))
        place = next(index for index, plan in enumerate(plans) if plan is self.plan)
        start = max(0, min(place - _BUDGETS // 2, len(plans) - _BUDGETS))
        return plans[start : start + _BUDGETS]

    def predicted_loss(self, plan: PlanFindings) -> float | None:
        """Predicted loss of a plan, its KV cache included."""
        found = predicted_loss(self.shipped.prices, decoded(plan.choice, self.findings.formats))
        return None if found is None else found + plan.kv_cache_loss

    def measured_of(self, plan: PlanFindings) -> MeasuredLosses | None:
        """Measured losses of a plan's choice."""
        return self.shipped.measured.get((plan.choice, plan.kv_cache))
