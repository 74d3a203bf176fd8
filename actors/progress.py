"""Progress of a run for people: bars on a terminal, a line every few seconds in a log. A listener of events."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from actors.events import Event

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

# Seconds between two lines of a log while nothing finishes.
_QUIET = 10.0


class Progress:
    """Told of every event; writes to standard error, so that --json output stays clean."""

    def __init__(self, console: Console, bars: Bars | None) -> None:
        self.console = console
        self.bars = bars
        self.tasks: dict[str, Any] = {}
        self.stage = ""
        self.total = self.done = self.tokens = self.moved = 0
        self.started = self.spoke = time.monotonic()
        self.doing: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        """Show an event."""
        shown = getattr(self, f"on_{event.kind.replace('-', '_')}", None)
        if shown is not None:
            shown(event.payload)

    def on_pass(self, payload: dict[str, Any]) -> None:
        """A pass begins."""
        self.stage, self.total = payload["stage"], payload["units"]
        self.done = self.tokens = self.moved = 0
        self.started = self.spoke = time.monotonic()
        self.doing.clear()
        if self.bars is not None:
            for task in self.tasks.values():
                self.bars.remove_task(task)
            self.tasks = {"": self.bars.add_task(self.stage, total=payload["steps"], rate="")}

    def on_step(self, payload: dict[str, Any]) -> None:
        """A worker has taken a step."""
        # Every unit of a shard has seen the tokens of a step.
        self.tokens += payload.get("tokens", 0) * payload["units"]
        self.moved += payload.get("hop_bytes", 0) + payload.get("read_bytes", 0) + payload.get("written_bytes", 0)
        at = "finished" if payload["microbatch"] is None else f"at {payload['microbatch'] + 1}"
        self.doing[payload["worker"]] = f"{payload['shard']} {at}"
        if self.bars is not None:
            self.bars.update(self.tasks[""], advance=1, rate=self._figures())
            self._show_worker(payload["worker"])
        elif time.monotonic() - self.spoke > _QUIET:
            self._line()

    def on_shard(self, payload: dict[str, Any]) -> None:
        """A shard is finished."""
        self.done += len(payload["units"])
        if self.bars is None:
            self._line()
        else:
            self.bars.update(self.tasks[""], rate=self._figures())

    def on_lost(self, payload: dict[str, Any]) -> None:
        """A worker is gone."""
        self.doing.pop(payload["worker"], None)
        if self.bars is not None and payload["worker"] in self.tasks:
            self.bars.remove_task(self.tasks.pop(payload["worker"]))
        held = f"; {payload['shard']} is run again" if payload["shard"] else ""
        self._say(f"lost {payload['worker']}: {payload['cause']}{held}")

    def on_worker(self, payload: dict[str, Any]) -> None:
        """A worker is ready."""
        self._say(f"{payload['worker']} is ready: {payload['device']} on {payload['host']}, process {payload['pid']}")

    def on_repair(self, payload: dict[str, Any]) -> None:
        """A stored object is damaged and its work is done again."""
        self._say(f"damaged: {payload['key']}; {', '.join(payload['forgotten']) or 'nothing'} is made again")

    def _figures(self) -> str:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        left = elapsed / self.done * (self.total - self.done) if self.done else None
        eta = f"  ETA {left:.0f} s" if left is not None else ""
        return f"{self.tokens / elapsed:,.0f} token-blocks/s  {self.moved / 1e6:,.1f} MB moved{eta}"

    def _line(self) -> None:
        self.spoke = time.monotonic()
        doing = ", ".join(f"{worker} {what}" for worker, what in sorted(self.doing.items()))
        self._say(f"{self.stage} {self.done}/{self.total}  {self._figures()}  [{doing}]")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _show_worker(self, worker: str) -> None:
        assert self.bars is not None
        if worker not in self.tasks:
            self.tasks[worker] = self.bars.add_task("", total=None, rate="")
        self.bars.update(self.tasks[worker], description=f"  {worker} {self.doing[worker]}")


@contextmanager
def progress() -> Iterator[Progress]:
    """Show the progress of a run inside the with-block."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield Progress(console, None)
        return
    bars = Bars(TextColumn("{task.description:>10}"), BarColumn(), TextColumn("{task.fields[rate]}"), console=console)
    with bars:
        yield Progress(console, bars)
