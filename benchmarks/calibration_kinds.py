"""Held-out KL on every kind of text in the mix, for plans that were calibrated on different texts.

    .venv/bin/python -m benchmarks.calibration_kinds [--config FILE] [--sequences 8] [--set key=value] TEXT [TEXT …]

Each TEXT is a source of `calibration.text`, e.g. `mix:all configs/data/calibration.txt`. For each of them the
configuration (by default the demo's) is quantized in a store of its own, and the result is measured on `--sequences` of
512 tokens of each kind's held-out part. Nats per token with weights and activations rounded, one row a kind, printed as
Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import demo
from prismaquant_ray import Event, evaluate, load_config, quantize
from prismaquant_ray.events import PassBegan
from prismaquant_ray.settings.texts import MIX, MIX_KINDS

LENGTH = 512


def measured(config: Path, text: str, settings: list[str], sequences: int) -> tuple[str, list[str]]:
    """The plan, and KL with its standard error on every kind, of a model calibrated on one text."""

    def heard(event: Event) -> None:
        if isinstance(event, PassBegan):
            print(f"{text}: {event.stage}", flush=True)

    with tempfile.TemporaryDirectory(prefix="calibration-kinds-") as place:
        places = [f"store.run={place}/run", f"store.output={place}/repository"]
        chosen = load_config(config, ["evaluation=null", *settings, f"calibration.text={text}", *places])
        plan = quantize(chosen, on_event=heard).repository.plan
        overrides = [f"cluster.{key}={getattr(chosen.cluster, key)}" for key in ("address", "workers", "threads")]
        cells = []
        for kind in MIX_KINDS:
            found = evaluate(
                f"{place}/repository",
                chosen.model.source,
                f"{MIX}{kind}",
                sequences=sequences,
                length=LENGTH,
                overrides=overrides,
            ).activations
            cells.append(f"{found.kl_mean:.4f} ± {found.kl_standard_error:.4f}")
            print(f"{text}: {kind} {cells[-1]}", flush=True)
    return f"{plan.bpp:.4f} bits, predicted {plan.predicted_loss:.4f}", cells


def main() -> None:
    """Measure every text and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--config", type=Path, default=demo.CONFIG)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    arguments = parser.parse_args()
    demo.need()
    columns = [measured(arguments.config, text, arguments.set, arguments.sequences) for text in arguments.texts]
    print(f"| | {' | '.join(arguments.texts)} |\n|{'---|' * (len(columns) + 1)}")
    print(f"| plan | {' | '.join(plan for plan, _ in columns)} |")
    for row, kind in enumerate(MIX_KINDS):
        print(f"| {kind} | {' | '.join(cells[row] for _, cells in columns)} |")


if __name__ == "__main__":
    main()
