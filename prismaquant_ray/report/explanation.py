"""Why a module has its format: the cost of each format, against the price of a byte under the budget.

Let λ be the slope of the frontier at the plan's bytes: nats per token saved by one more byte. A single group is best in
the format of least cost + λ · bytes. A plan departs from that only for the few groups that use up the bytes left over
by indivisible formats.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from prismaquant_ray.allocation.constraints import ruled_out
from prismaquant_ray.allocation.frontier import frontier
from prismaquant_ray.allocation.plans import Planner
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.fitting import refusal
from prismaquant_ray.formatting import figure, size
from prismaquant_ray.layout import FusedGroup, Layout
from prismaquant_ray.records import PlanRecord

_NEAREST = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """A format of the run for one group. `refused` says why the group cannot take it; then there are no figures.

    `bytes` are as the budget counts them and `predicted_loss` is nats per token under the plan's objective.
    `loss_per_byte_saved` compares it with the next larger format that the group can take; None for the largest, and
    where that has the same bytes.
    """

    format: FormatName
    refused: str | None
    bytes: int | None
    predicted_loss: float | None
    loss_per_byte_saved: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Why a module has its format, or none.

    `group` is its fused group, None for an unquantized module; `format` is the group's format in the plan for `target`.
    `nats_per_byte` is λ; None under limits on time, where no single number decides. `alternatives` are by size, the
    smallest first, refused ones last.
    """

    name: str
    group: str | None
    format: FormatName | None
    target: str
    nats_per_byte: float | None
    alternatives: list[Alternative]
    reason: str

    def lines(self) -> Iterator[str]:
        """The explanation as text."""
        if self.group is None:
            yield f"{self.name} stays as it is: {self.reason}"
            return
        belongs = "" if self.group == self.name else f" (in {self.group})"
        yield f"{self.name}{belongs} is {self.format} in the plan for {self.target}: {self.reason}"
        if self.nats_per_byte is not None:
            yield f"  the price of a byte under this budget is {figure(self.nats_per_byte, 3)} nats per token"
        for entry in self.alternatives:
            if entry.refused is not None:
                yield f"  {entry.format:<8} not possible: {entry.refused}"
                continue
            saved = entry.loss_per_byte_saved
            rate = "" if saved is None else f", {figure(saved, 3)} nats per byte saved against the next larger"
            yield f"  {entry.format:<8} {size(entry.bytes)}, predicted loss {figure(entry.predicted_loss)}{rate}"


def explain(planner: Planner, plan: PlanRecord, name: str) -> Explanation:
    """The reason for one module's format; `name` is of a fused group, a Linear or an ignored module, in any runtime.

    Raises:
        InputError: nothing has this name; the message has the nearest ones.
    """
    layout = planner.layout
    groups, ignored = _names(layout)
    if name in ignored:
        return Explanation(
            name=name,
            group=None,
            format=None,
            target=plan.target,
            nats_per_byte=None,
            alternatives=[],
            reason=layout.ignored[ignored[name]],
        )
    if name not in groups:
        near = difflib.get_close_matches(name, [*groups, *ignored], n=_NEAREST)
        known = f"did you mean {' or '.join(near)}?" if near else f"{layout.groups[0].name} is the name of a group"
        raise InputError(f"{name}: the model has no such module; {known}")
    group = groups[name]
    multiplier, found = nats_per_byte(planner, plan), _alternatives(planner, group)
    return Explanation(
        name=name,
        group=group.name,
        format=plan.choice[group.name],
        target=plan.target,
        nats_per_byte=multiplier,
        alternatives=found,
        reason=_reason(plan.choice[group.name], multiplier, found),
    )


def nats_per_byte(planner: Planner, plan: PlanRecord) -> float | None:
    """λ: nats per token saved by one more byte at the size of a plan; None under limits on time."""
    if planner.limits:
        return None
    problem = planner.problem(planner.config.budget)
    relaxation = frontier(problem).relaxation
    rows = np.arange(len(problem.groups))
    spent = int(problem.size[rows, problem.columns(plan.choice)].sum())
    edge = int(np.searchsorted(relaxation.bytes, spent, side="right")) - 1
    return float(relaxation.slope[edge]) if edge < len(relaxation.slope) else 0.0


def _names(layout: Layout) -> tuple[Mapping[str, FusedGroup], Mapping[str, str]]:
    """Groups by all their names; layout names of ignored modules by all their names."""
    groups: dict[str, FusedGroup] = {}
    for group in layout.groups:
        linears = (name for linear in group.linears for name in (linear.name, *linear.names))
        for name in (group.name, *linears):
            for alias in layout.aliases_of(name):
                groups.setdefault(alias, group)
    return groups, {alias: name for name in layout.ignored for alias in layout.aliases_of(name)}


def _alternatives(planner: Planner, group: FusedGroup) -> list[Alternative]:
    """Every format of the run for a group, the smallest first, refused ones last."""
    problem = planner.problem(planner.config.budget)
    row = problem.groups.index(group.name)
    allowed, refused = [], []
    for column, name in enumerate(planner.table.formats):
        if problem.allowed[row, column]:
            allowed.append((int(problem.size[row, column]), float(problem.cost[row, column]), name))
        else:
            reason = refusal(name, group) or ruled_out(planner.layout, planner.config.allocation, group, name)
            reason = reason or "it was not priced"
            refused.append(
                Alternative(format=name, refused=reason, bytes=None, predicted_loss=None, loss_per_byte_saved=None)
            )
    found = []
    larger: tuple[int, float] | None = None
    for bytes_, cost, name in sorted(allowed, reverse=True):
        rate = None if larger is None or larger[0] == bytes_ else (cost - larger[1]) / (larger[0] - bytes_)
        found.append(
            Alternative(format=name, refused=None, bytes=bytes_, predicted_loss=cost, loss_per_byte_saved=rate)
        )
        larger = bytes_, cost
    return [*reversed(found), *refused]


def _reason(chosen: FormatName, multiplier: float | None, alternatives: list[Alternative]) -> str:
    """One sentence: chosen because …"""
    there = {entry.format: entry for entry in alternatives if entry.refused is None}
    if len(there) == 1:
        return "chosen because it is the only format that the group can have"
    if multiplier is None:
        return "chosen together with all other groups, because limits on time count beside the budget"
    size_of = {name: entry.bytes or 0 for name, entry in there.items()}
    worth = {name: (entry.predicted_loss or 0.0) + multiplier * size_of[name] for name, entry in there.items()}
    best = min(worth, key=lambda name: worth[name])
    # Two formats on one edge of the frontier are worth the same.
    if worth[chosen] <= worth[best] + 1e-9 * abs(worth[best]):
        return "chosen because its predicted loss plus the price of its bytes is the least of all formats"
    larger = size_of[chosen] > size_of[best]
    way = "fill bytes that the budget has left" if larger else "pay for bytes of other groups"
    return f"chosen to {way}: by itself the group would be {best}"
