"""Progress of a run: a bar on a terminal, one line a unit in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from actors.messages import Receipt, Stage, Unit, unit_key
from actors.ring import FINISH, Step

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """Told of every receipt; writes to standard error, so that --json output stays clean."""

    def __init__(self, console: Console, stage: Stage, units: int, microbatches: int) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = console
        self.stage = stage
        self.units = units
        self.started = time.monotonic()
        self.tokens = 0
        self.finished = 0
        self.bar = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self.bar = Bar(*columns, console=console, transient=True)
            self.task = self.bar.add_task(f"{stage:<9}", total=units * (microbatches + 1), rate="")

    def __call__(self, stage: Stage, unit: Unit, step: Step, receipt: Receipt) -> None:
        """Take note of a finished step."""
        self.tokens += receipt.facts.get("tokens", 0)
        elapsed = time.monotonic() - self.started
        rate = f"{self.tokens / elapsed:,.0f} token-blocks/s"
        if step.microbatch == FINISH:
            self.finished += 1
        if self.bar is not None:
            self.bar.update(self.task, advance=1, rate=f"{self.finished}/{self.units} blocks  {rate}")
        elif step.microbatch == FINISH:
            left = elapsed / self.finished * (self.units - self.finished)
            self.console.print(
                f"{stage} {self.finished}/{self.units}  block {unit_key(unit)}  {receipt.worker}  {rate}  "
                f"peak {receipt.peak_bytes / 1e9:.2f} GB  ETA {left:.0f} s",
                highlight=False,
                soft_wrap=True,
            )


@contextmanager
def progress(stage: Stage, units: int, microbatches: int) -> Iterator[Progress]:
    """Show the progress of one pass."""
    from rich.console import Console

    shown = Progress(Console(file=sys.stderr), stage, units, microbatches)
    if shown.bar is None:
        yield shown
        return
    with shown.bar:
        yield shown
