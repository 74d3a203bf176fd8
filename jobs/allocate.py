"""`allocate`: the plan for the budget."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from jobs import planning
from jobs.run import Run
from prismaquant_ray.config import Config


def run(config: Config) -> dict[str, Any]:
    """Measure what is missing, then solve."""
    current = Run(config)
    return current.repairing(lambda: planning.allocate(current))


def render(result: dict[str, Any], console: Console) -> None:
    """One plan, for people."""
    formats = ", ".join(f"{count} {name}" for name, count in result["groups"].items() if count)
    console.print(
        f"{result['target']}: {result['bpp']:.4f} bits per parameter, predicted loss "
        f"{result['predicted_loss']:.5f} ± {result['standard_error']:.5f} nats/token, gap {result['gap']:.1e}"
    )
    console.print(
        f"  groups: {formats}; repository at most {result['repository_bytes_at_most'] / 1e6:,.1f} MB, "
        f"{result['loaded_bytes'] / 1e6:,.1f} MB as loaded"
    )
    if result["vram"] is not None:
        console.print(f"  vram: {memory(result['vram'])}")


def memory(vram: dict[str, Any]) -> str:
    """What memory is made of, in one line."""
    unit, name = (1e9, "GB") if vram["total"] >= 10**9 else (1e6, "MB")
    kinds = " + ".join(f"{kind.replace('_', ' ')} {size / unit:.2f}" for kind, size in vram["kv_cache_of"].items())
    return (
        f"{vram['total'] / unit:.2f} {name} = weights {vram['weights'] / unit:.2f} + KV cache "
        f"{vram['kv_cache'] / unit:.2f} ({kinds}; {vram['sequences']} × {vram['context']} tokens) + margin "
        f"{vram['margin'] / unit:.2f}"
    )
