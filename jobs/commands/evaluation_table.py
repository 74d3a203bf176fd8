"""Predicted and measured loss of plans and baselines, as a table: for `quantize` and `sweep --measure`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from prismaquant_ray.records import Divergence, MeasuredPlans

_TITLES = (
    "plan",
    "bpp",
    "predicted",
    "measured",
    "±",
    "predicted/measured",
    "weights only",
    "99 %",
    "top-1",
    "behind plan",
)


#: The share of tokens with other experts than in the source from which a summary says so.
_REROUTED = 0.05


def warn_of_routing(found: Divergence, what: str, console: Console) -> None:
    """A line where a mixture of experts sends many tokens to other experts than the source does."""
    if found.rerouted is not None and found.rerouted > _REROUTED:
        console.print(
            f"note: {what}{found.rerouted:.1%} of tokens meet other experts than in the source, a mean over layers; "
            "prices are of small changes and do not foresee these: trust what is measured, or set allocation.refine",
            soft_wrap=True,
        )


def render(result: MeasuredPlans, console: Console) -> None:
    """Every plan, then the knee of the measured curve."""
    console.print(
        f"measured on {result.text.tokens:,} tokens of {result.text.file}; the source's perplexity there is "
        f"{result.source.perplexity:.3f}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for title in _TITLES:
        table.add_column(title, justify="left" if title == "plan" else "right")
    for entry in result.plans:
        both, weights, behind = entry.activations, entry.weights, entry.behind_plan
        table.add_row(
            entry.label,
            f"{entry.bpp:.4f}",
            f"{entry.predicted_loss:.5f}",
            f"{both.kl_mean:.5f}",
            f"{both.kl_standard_error:.5f}",
            f"{entry.predicted_loss / both.kl_mean:.3f}" if both.kl_mean else "",
            "" if weights is None else f"{weights.kl_mean:.5f}",
            f"{both.kl_p99:.4f}",
            f"{both.top1_agreement:.2%}",
            "" if behind is None else f"{behind.kl:+.5f} ± {behind.standard_error:.5f}",
        )
    console.print(table)
    for entry in result.plans:
        warn_of_routing(entry.activations, f"{entry.label}: ", console)
    knee = result.knee
    if knee is not None:
        others = ", ".join(f"{each.bpp:.3f} from {each.from_bpp:.3f} to {each.to_bpp:.3f}" for each in knee.stability)
        console.print(
            f"measured knee: {knee.bpp:.3f} bits per parameter at {knee.kl:.5f} nats/token (from "
            f"{knee.from_bpp:.3f} to {knee.to_bpp:.3f}; {others})",
            soft_wrap=True,
        )
