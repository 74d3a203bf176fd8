"""Constraints beside the budget: formats forced or ruled out by name pattern, and limits on time.

Patterns are resolved against the layout before anything is measured. They become one mask, which every plan,
frontier and knee respects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from prismaquant_ray.allocation.budget import Sizes
from prismaquant_ray.allocation.limited_solver import LimitedSolver
from prismaquant_ray.allocation.problem import AllocationProblem
from prismaquant_ray.allocation.speed import Times
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.formats.fitting import refusal
from prismaquant_ray.layout import FusedGroup, Layout
from prismaquant_ray.settings.allocation import AllocationConfig, FormatRule, LimitsConfig
from prismaquant_ray.settings.budget import BudgetConfig

# A Linear of ordinary size, for the bits of a format that a group's own shape does not fit.
_NOMINAL = (4096, 4096)


def constrained(sizes: Sizes, layout: Layout, allocation: AllocationConfig) -> Sizes:
    """Sizes with the formats that `force` and `floor` leave.

    Raises:
        InputError: a pattern matches nothing or part of a fused group, a group cannot take a format, or settings
            contradict each other.
    """
    allowed = sizes.allowed.copy()
    forced: dict[int, FormatRule] = {}
    for rule in allocation.force:
        where = f"allocation.force {rule.match}"
        if rule.format not in sizes.formats:
            raise InputError(f"{where}: {rule.format} is not one of the formats; add it to formats")
        column = sizes.formats.index(rule.format)
        for row in _matched(layout, rule, where):
            group, other = layout.groups[row], forced.get(row)
            if other is not None and other.format != rule.format:
                raise InputError(
                    f"{where}: {group.name} is to be {rule.format}, and by {other.match} {other.format}; keep one"
                )
            if not sizes.allowed[row, column]:
                raise InputError(f"{where}: {group.name} cannot take {rule.format} ({refusal(rule.format, group)})")
            forced[row] = rule
            allowed[row] = np.arange(len(sizes.formats)) == column
    for rule in allocation.floor:
        where = f"allocation.floor {rule.match}"
        for row in _matched(layout, rule, where):
            group = layout.groups[row]
            least = _bits(rule.format, group)
            allowed[row] &= [_bits(name, group) >= least for name in sizes.formats]
            if allowed[row].any():
                continue
            if row in forced:
                raise InputError(
                    f"{where}: {group.name} is to have at least the bits of {rule.format}, and allocation.force "
                    f"{forced[row].match} makes it {forced[row].format}; change one"
                )
            raise InputError(
                f"{where}: none of the formats that {group.name} can take has the bits of {rule.format}; add one to "
                "formats"
            )
    return replace(sizes, allowed=allowed)


def check_limits(sizes: Sizes, times: Times, budget: BudgetConfig, settings: LimitsConfig) -> None:
    """Raise InputError unless a plan within the budget keeps the limits on time; no price is needed to know that."""
    limits = times.limits(settings)
    if not limits:
        return
    problem = AllocationProblem(
        groups=tuple(str(row) for row in range(len(sizes.weights))),
        formats=tuple(map(str, sizes.formats)),
        cost=np.where(sizes.allowed, 0.0, np.nan),
        size=sizes.of(budget),
    )
    LimitedSolver(problem, limits).check(sizes.limit(budget))


def ruled_out(layout: Layout, allocation: AllocationConfig, group: FusedGroup, name: FormatName) -> str | None:
    """The rule that forbids a format for a group, or None."""
    row = layout.groups.index(group)
    for rule in allocation.force:
        if name != rule.format and row in _matched(layout, rule, f"allocation.force {rule.match}"):
            return f"allocation.force {rule.match} makes it {rule.format}"
    for rule in allocation.floor:
        least = _bits(rule.format, group)
        if _bits(name, group) < least and row in _matched(layout, rule, f"allocation.floor {rule.match}"):
            return f"allocation.floor {rule.match} wants at least the bits of {rule.format}"
    return None


def restricted(sizes: Sizes, layout: Layout) -> int:
    """Number of groups with fewer formats than their shapes allow."""
    takes = np.array([[refusal(name, group) is None for name in sizes.formats] for group in layout.groups])
    return int((takes != sizes.allowed).any(axis=1).sum())


def _matched(layout: Layout, rule: FormatRule, where: str) -> Sequence[int]:
    """Rows of the groups that a pattern names, by their own name or by those of all their Linears."""
    rows = []
    for row, group in enumerate(layout.groups):
        if fnmatchcase(group.name, rule.match):
            rows.append(row)
            continue
        names = [name for linear in group.linears for name in linear.names]
        fitting = [name for name in names if fnmatchcase(name, rule.match)]
        if fitting and len(fitting) < len(names):
            other = next(name for name in names if not fnmatchcase(name, rule.match))
            raise InputError(
                f"{where}: matches {fitting[0]} and not {other}, which have one format in the fused group; match "
                f"{group.name}"
            )
        if fitting:
            rows.append(row)
    if rows:
        return rows
    kept = next((name for name in layout.ignored if fnmatchcase(name, rule.match)), None)
    if kept is not None:
        raise InputError(f"{where}: matches {kept}, which stays as it is ({layout.ignored[kept]}); remove it")
    raise InputError(f"{where}: matches nothing; {layout.groups[0].name} is the name of a group")


def _bits(name: FormatName, group: FusedGroup) -> float:
    """Bits per parameter of a group in a format, scales included."""
    spec = FORMATS[name]
    if refusal(name, group):
        return spec.bits(*_NOMINAL)
    stored = sum(len(item.names) * spec.weight_bytes(item.out_features, item.in_features) for item in group.linears)
    return 8 * stored / group.parameters
