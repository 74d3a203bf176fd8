"""`status STORE`: the state of a run store and the last events of its driver; works without the cluster."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from jobs.pipeline.status import Status, status
from prismaquant_ray.events import Waiting


def run(uri: str) -> Status:
    """Read records, lease and event log of a run store."""
    return status(uri)


def render(result: Status, console: Console) -> None:
    """Print the state of a run."""
    blocks = result.blocks
    total = "" if blocks.total is None else f" of {blocks.total}"
    console.print(f"{result.run}: {result.model}, {result.state}")
    console.print(f"  blocks: {blocks.encoded}{total} encoded, {blocks.priced}{total} priced")
    if result.driver:
        console.print(f"  driver: process {result.driver.pid} on {result.driver.host}")
    if result.last_event:
        console.print(f"  last event: {result.last_event.event}, {result.silent:.0f} s ago")
    if isinstance(result.last_event, Waiting):
        console.print(f"  {result.last_event.message}", soft_wrap=True)
    for worker in result.workers:
        state = "lost" if worker.lost else "ready"
        console.print(f"  {worker.worker}: {worker.device} on {worker.host}, process {worker.pid}, {state}")
    _render_passes(result, console)
    for lost in result.lost:
        console.print(f"  lost: {lost.worker}, {lost.cause}; held {lost.shard}")
    for repair in result.repairs:
        console.print(f"  repaired: {repair.key}")
    for repository in result.repositories:
        console.print(f"  repository: {repository.uri}, {repository.bytes / 1e6:,.1f} MB, {repository.bpp:.4f} bits")


def _render_passes(result: Status, console: Console) -> None:
    if not result.stages:
        return
    table = Table(box=None, pad_edge=False)
    for title in ("  pass", "units", "seconds", "ETA", "token-blocks/s", "MB hop", "read", "written", "busy"):
        table.add_column(title, justify="right")
    for stage in result.stages:
        table.add_row(
            f"  {stage.stage}",
            f"{stage.done}/{stage.units}",
            f"{stage.seconds:.0f}",
            "" if stage.eta is None else f"{stage.eta:.0f} s",
            f"{stage.token_blocks_per_second:,.0f}",
            *(f"{stage.bytes[kind] / 1e6:,.1f}" for kind in ("hop", "read", "written")),
            ", ".join(f"{share:.0%}" for share in stage.busy.values()),
        )
    console.print(table)
    for worker, where in sorted(result.stages[-1].workers.items()):
        console.print(f"  {worker}: {where}")
