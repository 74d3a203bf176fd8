"""`evaluate REPO --source MODEL --text FILE`: a repository measured against the model it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.commands.evaluation_table import warn_of_routing
from jobs.commands.progress import run_progress
from jobs.pipeline.repository_evaluation import EvaluatedRepository, evaluate


def run(
    repo: str,
    *,
    source: str,
    text: str,
    images: Path | None,
    sequences: int,
    length: int,
    store: str | None,
    max_kl: float | None,
    min_top1: float | None,
    overrides: Sequence[str],
) -> EvaluatedRepository:
    """Measure the repository, with and without activation rounding."""
    with run_progress() as progress:
        return evaluate(
            repo,
            source,
            text,
            images=images,
            sequences=sequences,
            length=length,
            store=store,
            max_kl=max_kl,
            min_top1=min_top1,
            overrides=overrides,
            on_event=progress,
        )


def render(result: EvaluatedRepository, console: Console) -> None:
    """The figures as a table, then the caveats."""
    formats = ", ".join(f"{count} {name}" for name, count in result.formats.items()) or "nothing quantized"
    bits, text = result.bits, result.text
    console.print(f"{result.repository}: {formats}", soft_wrap=True)
    quantized = "" if bits.quantized_linears is None else f"{bits.quantized_linears:.4f} of quantized Linears, "
    console.print(
        f"bits per parameter: {quantized}{bits.all_parameters:.3f} of all parameters, {bits.files:.3f} with "
        "every byte of every file",
        soft_wrap=True,
    )
    images = f" and {text.images} images" if text.images else ""
    console.print(f"against {result.source} on {text.sequences} × {text.length} tokens{images}:", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    routed = () if result.activations.rerouted is None else ("rerouted",)
    for title in ("", "KL nats/token", "±", "90 %", "99 %", "same top-1", "perplexity", "draft agrees", *routed):
        table.add_column(title, justify="left" if not title else "right")
    reference = result.source_figures
    table.add_row("source", "", "", "", "", "", f"{reference.perplexity:.4f}", _share(reference.draft_agreement))
    rows = {"weights rounded": result.weights, "weights and activations rounded": result.activations}
    for title, row in rows.items():
        table.add_row(
            title,
            f"{row.kl_mean:.6f}",
            f"{row.kl_standard_error:.6f}",
            f"{row.kl_p90:.5f}",
            f"{row.kl_p99:.5f}",
            f"{row.top1_agreement:.2%}",
            f"{row.perplexity:.4f}",
            _share(row.draft_agreement),
            *(_share(row.rerouted) for _ in routed),
        )
    console.print(table)
    warn_of_routing(result.activations, "", console)
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for limit in result.missed:
        console.print(f"not good enough: {limit}", soft_wrap=True)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
