"""`probe`: both passes, nothing chosen."""

from __future__ import annotations

from rich.console import Console

from jobs.commands.progress import run_progress
from jobs.pipeline.run import Run
from prismaquant_ray.config import Config
from prismaquant_ray.report.summary import OPTIMISTIC, ProbeSummary, summarize_probe


def run(config: Config, *, fresh: bool = False) -> ProbeSummary:
    """Measure what is missing and summarize both passes."""
    with run_progress() as progress:
        return Run(config, fresh=fresh, on_event=progress).repairing(lambda known: summarize_probe(known.data))


def render(result: ProbeSummary, console: Console) -> None:
    """Print the summary of both passes."""
    console.print(f"measured {result.groups} groups in {result.blocks} blocks over {result.tokens:,} tokens")
    for name, loss in result.uniform_loss.items():
        console.print(f"  all {name:<9} predicted loss {'not possible' if loss is None else f'{loss:.4f} nats/token'}")
    for codec, ratio in result.holdout_error_to_nearest.items():
        wins = ", ".join(f"{method} {count}" for method, count in sorted(result.methods[codec].items()))
        console.print(f"  {codec:<13} held-out output error {ratio:.3f} of round-to-nearest ({wins})")
    if result.experts:
        fewest = min(entry.fewest for entry in result.experts.values())
        unseen = sum(entry.unseen for entry in result.experts.values())
        console.print(
            f"  experts of {len(result.experts)} layers: {fewest:,} calibration tokens at least, {unseen} saw none"
        )
    if result.draft_agreement:
        agreement = ", ".join(f"{name} {share:.3f}" for name, share in result.draft_agreement.items())
        console.print(f"  draft head agrees with the model's best guess: {agreement}")
    if result.without_gradient:
        more = f" and {len(result.without_gradient) - 1} more" if len(result.without_gradient) > 1 else ""
        console.print(f"  note: no gradient reaches {result.without_gradient[0]}{more}; every format of it is priced 0")
    for name, found in result.optimism.items():
        if not 1 / OPTIMISTIC <= found.ratio <= OPTIMISTIC:
            console.print(
                f"  note: rounded to {name}, weights cost {found.ratio:.2f} ± {found.standard_error:.2f} times as much "
                f"on held-out sequences as on all; prices are multiplied by {found.factor:.2f}: calibrate on more",
                soft_wrap=True,
            )
    console.print("most sensitive:")
    for price in result.most_sensitive[:5]:
        console.print(f"  {price.cost:.5f} ± {price.standard_error:.5f}  {price.format:<8} {price.group}")
