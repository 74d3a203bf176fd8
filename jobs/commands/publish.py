"""`publish REPO TARGET`: send a finished repository to the hub or an object store, and compare it there."""

from __future__ import annotations

from rich.console import Console

from jobs.commands.progress import upload_progress
from jobs.pipeline.publishing import publish
from prismaquant_ray.publishing.finished import Published


def run(repo: str, target: str, *, public: bool = False) -> Published:
    """Send the files that are not at the target yet."""
    with upload_progress() as progress:
        return publish(repo, target, public=public, listener=progress)


def render(result: Published, console: Console) -> None:
    """Print the number and size of published files."""
    seen = {None: "", True: ", public", False: ", private"}[result.public]
    console.print(
        f"{result.place}: {result.verified} files, {result.bytes / 1e6:,.1f} MB, verified{seen}; "
        f"{len(result.sent)} sent ({result.bytes_sent / 1e6:,.1f} MB), {len(result.present)} there already",
        soft_wrap=True,
    )
    if result.removed:
        console.print(f"  removed, left by an earlier version: {', '.join(result.removed)}", soft_wrap=True)
    if result.unlisted:
        console.print(f"  not published, not in prismaquant.json: {', '.join(result.unlisted)}", soft_wrap=True)
