"""Progress for people, on standard error: bars on a terminal, lines in a log. Results go to standard output."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from prismaquant_ray.events import (
    Event,
    Notice,
    ObjectRepaired,
    PassBegan,
    Preflighted,
    ShardDone,
    ShardsShrunk,
    StepDone,
    TextsRead,
    Waiting,
    WorkerLost,
    WorkerReady,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn

# Seconds between lines of a log while no shard finishes.
_QUIET = 10.0


# Seconds without a line, whatever the reason, after which the last one is repeated. Events that say more come earlier.
_SILENT = 15.0


def told(event: TextsRead) -> str:
    """What the sequences of calibration or evaluation were taken from."""
    parts = [
        f"{taken.name} {taken.sequences} × {event.length}"
        + ("" if taken.rows is None else f" from {taken.rows:,} rows, {taken.dropped or 0:,} without text dropped")
        for taken in event.sources
    ]
    return f"text of the {event.purpose}: {'; '.join(parts)}; fingerprint {event.fingerprint[:12]}"


class _Display:
    """A console on standard error, with bars if it is a terminal."""

    def __init__(self, console: Console, bars: Bars | None) -> None:
        self.console = console
        self.bars = bars
        self.spoke = self.said = time.monotonic()
        self.last = ""

    def say(self, text: str) -> None:
        """A line."""
        self.spoke = self.said = time.monotonic()
        self.last = text
        self._print(text)

    def repeat(self) -> None:
        """The last line again, and how old it is, if nothing was said for long."""
        now = time.monotonic()
        if now - self.spoke >= _SILENT:
            self.spoke = now
            self._print(f"{now - self.said:.0f} s since: {self.last or 'the command began'}")

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


D = TypeVar("D", bound=_Display)


class RunProgress(_Display):
    """A listener of a run's events."""

    def __init__(self, console: Console, bars: Bars | None) -> None:
        super().__init__(console, bars)
        self.tasks: dict[str, Any] = {}
        self.began = PassBegan(stage="", shards=0, units=0, produced=0, microbatches=0, steps=0)
        self.done = self.tokens = self.moved = 0
        self.started = time.monotonic()
        self.doing: dict[str, str] = {}
        self.hosts: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case PassBegan():
                self._begin(event)
            case StepDone():
                self._step(event)
            case ShardDone():
                self._shard(event)
            case TextsRead():
                self.say(told(event))
            case WorkerLost():
                self._lost(event)
            case WorkerReady():
                self.hosts[event.worker] = event.host
                self.say(f"{event.worker} is ready: {event.device} on {event.host}, process {event.pid}")
            case Preflighted():
                self.say(
                    f"preflight: a few tokens went through {len(event.tried)} kinds of blocks, forward and backward, "
                    f"in {event.seconds:.1f} s"
                )
            case ObjectRepaired():
                self.say(f"damaged: {event.key}; {', '.join(event.forgotten) or 'nothing'} is made again")
            case ShardsShrunk():
                self.say(f"{event.message}; shards have at most {event.blocks} blocks from now on")
            case Notice() | Waiting():
                self.say(event.message)

    def _begin(self, event: PassBegan) -> None:
        self.began = event
        self.done = self.tokens = self.moved = 0
        self.started = self.spoke = time.monotonic()
        self.doing.clear()
        if self.bars is not None:
            for task in self.tasks.values():
                self.bars.remove_task(task)
            self.tasks = {"": self.bars.add_task(event.stage, total=event.steps, rate="")}

    def _step(self, event: StepDone) -> None:
        # Every unit of the shard processes the tokens of a step.
        self.tokens += (event.tokens or 0) * event.units
        self.moved += (event.hop_bytes or 0) + (event.read_bytes or 0) + (event.written_bytes or 0)
        at = "finished" if event.microbatch is None else f"at {event.microbatch + 1}"
        self.doing[event.worker] = f"{event.shard} {at}"
        if self.bars is not None:
            self.spoke = time.monotonic()
            self.bars.update(self.tasks[""], advance=1, rate=self._figures())
            if event.worker not in self.tasks:
                self.tasks[event.worker] = self.bars.add_task("", total=None, rate="")
            self.bars.update(self.tasks[event.worker], description=f"  {event.worker} {self.doing[event.worker]}")
        elif time.monotonic() - self.spoke > _QUIET:
            self._line()

    def _shard(self, event: ShardDone) -> None:
        self.done += len(event.units)
        if self.bars is None:
            self._line()
        else:
            self.bars.update(self.tasks[""], rate=self._figures())

    def _lost(self, event: WorkerLost) -> None:
        self.doing.pop(event.worker, None)
        if self.bars is not None and event.worker in self.tasks:
            self.bars.remove_task(self.tasks.pop(event.worker))
        held = f"; {event.shard} is run again" if event.shard else ""
        where = f" on {self.hosts[event.worker]}" if event.worker in self.hosts else ""
        self.say(f"lost {event.worker}{where}: {event.cause}{held}")

    def _figures(self) -> str:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        left = elapsed / self.done * (self.began.units - self.done) if self.done else None
        eta = f"  ETA {left:.0f} s" if left is not None else ""
        return f"{self.tokens / elapsed:,.0f} token-blocks/s  {self.moved / 1e6:,.1f} MB moved{eta}"

    def _line(self) -> None:
        doing = ", ".join(f"{worker} {what}" for worker, what in sorted(self.doing.items()))
        self.say(f"{self.began.stage} {self.done}/{self.began.units}  {self._figures()}  [{doing}]")


class UploadProgress(_Display):
    """A listener of a publication."""

    def __init__(self, console: Console, bars: Bars | None) -> None:
        super().__init__(console, bars)
        self.task: Any = None

    def begin(self, what: str, files: int, size: int) -> None:
        """A stage begins: `files` files of `size` bytes in total."""
        text = f"{what} {files} files, {size / 1e6:,.1f} MB"
        if self.bars is None:
            self.say(text)
            return
        self.spoke = time.monotonic()
        if self.task is not None:
            self.bars.remove_task(self.task)
        self.task = self.bars.add_task(text, total=size)

    def advance(self, size: int) -> None:
        """`size` more bytes are done."""
        if self.bars is not None:
            self.spoke = time.monotonic()
            self.bars.advance(self.task, size)

    def done(self, name: str, what: str, size: int) -> None:
        """A file is done."""
        self.say(f"{name} {what}: {size / 1e6:,.1f} MB in {time.monotonic() - self.spoke:,.1f} s")


@contextmanager
def run_progress() -> Iterator[RunProgress]:
    """Show the events of a run inside the with-block."""
    from rich.progress import BarColumn, TextColumn

    columns = (TextColumn("{task.description:>10}"), BarColumn(), TextColumn("{task.fields[rate]}"))
    with _display(columns) as (console, bars), _repeating(RunProgress(console, bars)) as shown:
        yield shown


@contextmanager
def upload_progress() -> Iterator[UploadProgress]:
    """Show a publication inside the with-block."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with _display(columns) as (console, bars), _repeating(UploadProgress(console, bars)) as shown:
        yield shown


@contextmanager
def _repeating(shown: D) -> Iterator[D]:
    """A thread repeats the last line inside the with-block, however long the caller is kept waiting."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(1.0):
            shown.repeat()

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield shown
    finally:
        done.set()
        thread.join()


@contextmanager
def _display(columns: tuple[ProgressColumn, ...]) -> Iterator[tuple[Console, Bars | None]]:
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield console, None
        return
    with Bars(*columns, console=console) as bars:
        yield console, bars
