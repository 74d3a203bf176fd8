"""`publish REPO TARGET`: a finished repository on the hub or in an object store, compared after it arrived."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from prismaquant_ray.errors import InputError
from prismaquant_ray.publishing.bucket import check_bucket, publish_to_bucket
from prismaquant_ray.publishing.finished import FinishedRepository, Listener, Published, open_finished

if TYPE_CHECKING:
    from rich.progress import Progress as Bars


def run(repository: str, target: str, *, public: bool = False) -> dict[str, Any]:
    """Send what is not at the target yet. Nothing is sent before repository and target are checked."""
    _check_target(target, public=public)
    source = open_finished(repository)
    with _progress() as listener:
        if target.startswith("hf://"):
            published = _to_hub(source, target, listener, public=public)
        else:
            check_bucket(source, target)
            published = publish_to_bucket(source, source.digest(listener), target, listener)
    return {
        "source": repository,
        "target": target,
        "place": published.place,
        "public": published.public,
        "verified": len(published.sent) + len(published.present),
        "bytes": sum(source.sizes.values()),
        "bytes_sent": published.bytes_sent,
        "sent": list(published.sent),
        "present": list(published.present),
        "removed": list(published.removed),
        "unlisted": list(source.unlisted),
    }


def _check_target(target: str, *, public: bool) -> None:
    if not target.startswith(("hf://", "s3://", "gs://")):
        raise InputError(f"{target} is no place to publish at; give hf://org/name, s3://bucket/prefix or gs://…")
    if public and not target.startswith("hf://"):
        raise InputError(f"--public is for hf://; who reads {target} is the bucket's policy to say")


def _to_hub(source: FinishedRepository, target: str, listener: Listener, *, public: bool) -> Published:
    # Not needed for buckets, and not quick to import.
    from huggingface_hub import HfApi

    from prismaquant_ray.publishing.hub import check_hub, publish_to_hub
    from prismaquant_ray.publishing.hub_client import HubRepository

    repository = HubRepository(target, HfApi(library_name="prismaquant-ray"))
    check_hub(source, repository, public=public)
    return publish_to_hub(source, source.digest(listener), repository, listener, public=public)


def render(result: dict[str, Any], console: Console) -> None:
    """What was published, for people."""
    seen = {None: "", True: ", public", False: ", private"}[result["public"]]
    console.print(
        f"{result['place']}: {result['verified']} files, {result['bytes'] / 1e6:,.1f} MB, verified{seen}; "
        f"{len(result['sent'])} sent ({result['bytes_sent'] / 1e6:,.1f} MB), {len(result['present'])} there already",
        soft_wrap=True,
    )
    if result["removed"]:
        console.print(f"  removed, left by an earlier version: {', '.join(result['removed'])}", soft_wrap=True)
    if result["unlisted"]:
        console.print(f"  not published, not in prismaquant.json: {', '.join(result['unlisted'])}", soft_wrap=True)


class _Progress:
    """A bar on a terminal, a line for every file in a log; on standard error, so that --json output stays clean."""

    def __init__(self, console: Console, bars: Bars | None) -> None:
        self.console = console
        self.bars = bars
        self.task: Any = None
        self.spoke = time.monotonic()

    def begin(self, what: str, files: int, size: int) -> None:
        """A stage begins."""
        self.spoke = time.monotonic()
        text = f"{what} {files} files, {size / 1e6:,.1f} MB"
        if self.bars is None:
            self._say(text)
            return
        if self.task is not None:
            self.bars.remove_task(self.task)
        self.task = self.bars.add_task(text, total=size)

    def advance(self, size: int) -> None:
        """So many bytes more."""
        if self.bars is not None:
            self.bars.advance(self.task, size)

    def done(self, name: str, what: str, size: int) -> None:
        """A file is there."""
        elapsed, self.spoke = time.monotonic() - self.spoke, time.monotonic()
        self._say(f"{name} {what}: {size / 1e6:,.1f} MB in {elapsed:,.1f} s")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _progress() -> Iterator[Listener]:
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _Progress(console, None)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        yield _Progress(console, bars)
