"""Where the passes' time goes, and how far that is from what this machine can do: `python -m benchmarks.roofline`.

Both passes of the demo's model run in this process, which has a worker's environment, in one thread: statistics, scale
search, GPTQ and acceptance for NVFP4 and MXFP8, then exits and prices. CPU seconds are exclusive: of two stages of
which one calls the other, each has its own. The bound of a stage is the larger of two times: its multiply-adds at the
rate of this machine's matrix products in the type they are done in, and the bytes it must read and write at the rate of
copying, both measured first. Bytes are those of weights, candidates and what enters and leaves every Linear, once; what
a stage keeps in between counts as nothing. Starting processes, Ray, storage and assembly are in `service` and
`whole_job`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from transformers import AutoTokenizer

from benchmarks import demo, results
from benchmarks.probe import FORMATS, LENGTH, Candidates, Probe
from prismaquant_ray.backward.block import BlockBackward
from prismaquant_ray.backward.loss import Loss
from prismaquant_ray.backward.pricing import Pricing
from prismaquant_ray.calibration.text import load_sequences
from prismaquant_ray.formats import FormatName
from prismaquant_ray.forward import block, encode
from prismaquant_ray.forward.block import BlockForward
from prismaquant_ray.forward.encode import Rounding
from prismaquant_ray.forward.statistics import InputSums
from prismaquant_ray.layout import Layout
from prismaquant_ray.model.runner import ModelRunner

# A stage, and the functions whose time is its own. What remains is "rest".
STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    "loading weights": ((ModelRunner, "load_block"),),
    "forward": ((BlockForward, "run"),),
    "Hessians": ((InputSums, "add"), (InputSums, "statistics")),
    "factorization": ((Rounding, "factor"),),
    "scale search": ((encode, "nearest"), (encode, "searched")),
    "GPTQ": ((encode, "gptq"),),
    "acceptance": ((encode, "_judged"),),
    "packing": ((block._Encoded, "add"),),
    "exits": ((Loss, "gradient"),),
    "decoding candidates": ((Pricing, "__init__"),),
    "recomputation": ((BlockBackward, "forward"),),
    "input gradients": ((BlockBackward, "differentiate"),),
    "error products": ((Pricing, "_difference"),),
    "prices": ((Pricing, "add"),),
}
REST = "rest"
# Roundings of each format of `probe` that are judged: nearest, search and GPTQ; MXFP8 has no scale to search.
JUDGED = {FormatName.NVFP4: 3, FormatName.MXFP8: 2}
# Bytes a weight as it is stored, with its share of the scale.
STORED = {FormatName.NVFP4: 0.5 + 1 / 16, FormatName.MXFP8: 1 + 1 / 32}


class Stopwatch:
    """Exclusive CPU seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack = [REST]
        self._since = time.process_time()

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Time in the block is the stage's, but for what other stages take in it."""
        self._switch()
        self._stack.append(stage)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every function of STAGES is timed."""
        with ExitStack() as stack:
            for stage, functions in STAGES.items():
                for owner, name in functions:
                    stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), stage)))
            self._since = time.process_time()
            yield
            self._switch()

    def _timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            with self.of(stage):
                return function(*arguments, **named)

        return timed


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Multiply-adds in the model's type and in float32, and bytes read and written."""

    own: float = 0.0
    single: float = 0.0
    moved: float = 0.0

    def bound(self, rates: dict[str, float], name: str) -> tuple[float, str]:
        """Seconds below which it cannot be, and what sets them."""
        arithmetic = self.own / rates[name] + self.single / rates["float32"]
        copying = self.moved / rates["bytes"]
        return (arithmetic, "multiply-adds") if arithmetic >= copying else (copying, "bytes")


def work(layout: Layout, config: Any, tokens: int, size: int) -> dict[str, Work]:
    """What each stage must do, for so many tokens in sequences of LENGTH, in a type of `size` bytes."""
    inputs = [group for block in layout.blocks for group in block.inputs]
    widths = [group.in_features for group in inputs]
    rows = [sum(matrix.rows[-1].stop for matrix in group.matrices) for group in inputs]
    weights = layout.parameters
    formats = len(STORED)
    through = size * (weights + tokens * (sum(widths) + sum(rows)))
    # Scores and their product with the values, below the diagonal; the backward pass has five such products for two.
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = tokens * LENGTH * config.num_attention_heads * head_size * len(layout.blocks)
    output_error = sum(o * i * i / 2 for o, i in zip(rows, widths, strict=True))
    head = layout.vocab_size * layout.hidden_size
    run = Work(own=tokens * weights + attention, moved=through)
    return {
        # Twice, as stored.
        "loading weights": Work(moved=2 * (2 + size) * weights),
        "forward": run,
        # Symmetric.
        "Hessians": Work(single=tokens * sum(i * (i + 1) / 2 for i in widths), moved=size * tokens * sum(widths)),
        "factorization": Work(single=sum(i**3 / 6 for i in widths), moved=2 * 4 * sum(i * i for i in widths)),
        "scale search": Work(moved=formats * (size + 1) * weights),
        "GPTQ": Work(single=formats * output_error, moved=formats * (size + 1) * weights),
        "acceptance": Work(single=sum(JUDGED.values()) * output_error, moved=sum(JUDGED.values()) * size * weights),
        "packing": Work(moved=sum(1 + stored for stored in STORED.values()) * weights),
        "exits": Work(own=2 * tokens * head, moved=4 * size * tokens * layout.vocab_size),
        "decoding candidates": Work(moved=sum(stored + 2 for stored in STORED.values()) * weights),
        "recomputation": run,
        "input gradients": Work(own=tokens * weights + 2.5 * attention, moved=through),
        "error products": Work(own=formats * tokens * weights, moved=formats * through),
        # The product in float32, the input, and the output gradient for the traces.
        "prices": Work(moved=tokens * (formats * (4 + size) * sum(widths) + size * sum(rows))),
    }


def rates() -> dict[str, float]:
    """Multiply-adds a second in either type, and bytes read or written a second while copying; medians."""
    found = {}
    for name in ("float32", "bfloat16"):
        left = torch.randn(2048, 1536).to(getattr(torch, name))
        found[name] = 2048 * 1536 * 1536 / _median(functools.partial(torch.mm, left, left.T[:, :1536].contiguous()))
    source = torch.zeros(1 << 28, dtype=torch.uint8)
    found["bytes"] = 2 * source.numel() / _median(functools.partial(torch.empty_like(source).copy_, source))
    return found


def _median(action: Callable[[], Any], repeats: int = 9) -> float:
    seconds = []
    for _ in range(repeats + 1):
        begun = time.process_time()
        action()
        seconds.append(time.process_time() - begun)
    return statistics.median(seconds[1:])


def passes(probe: Probe) -> None:
    """Forward with every candidate, exits, backward with every price."""
    candidates: Candidates = {}
    with torch.no_grad(), probe.runner.entry():
        boundaries = [[probe.runner.embed(batch.inputs) for batch in probe.batches]]
    for index in probe.blocks:
        block_pass = BlockForward(probe.runner, index, FORMATS, Rounding())
        boundaries.append([block_pass.run(h, batch) for h, batch in zip(boundaries[-1], probe.batches, strict=True)])
        candidates[index] = block_pass.finish().tensors
    probe.price(boundaries, candidates)


def measure(name: str, tokens: torch.Tensor) -> dict[str, Any]:
    """Seconds and bounds of every stage in one type."""
    probe = Probe(tokens, getattr(torch, name))
    watch = Stopwatch()
    with watch.watching():
        passes(probe)
    rate = rates()
    size = torch.empty(0, dtype=getattr(torch, name)).element_size()
    todo = work(probe.runner.layout, probe.runner.meta_model.config, tokens.numel(), size)
    stages: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        bound, limit = todo[stage].bound(rate, name)
        stages[stage] = {"seconds": watch.seconds[stage], "bound": bound, "limit": limit}
    stages[REST] = {"seconds": watch.seconds[REST], "bound": 0.0, "limit": ""}
    total, bound = (sum(stage[key] for stage in stages.values()) for key in ("seconds", "bound"))
    return {"rates": rate, "stages": stages, "seconds": total, "bound": bound}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The figures for people."""
    for stage, of in found["stages"].items():
        reached = f"{of['bound'] / of['seconds']:>6.0%} of {of['limit']}" if of["limit"] else ""
        share = of["seconds"] / found["seconds"]
        yield f"{stage:<20}{of['seconds']:>8.2f} s{share:>6.0%}{of['bound']:>8.2f} s{reached}"
    reached = found["bound"] / found["seconds"]
    yield f"{'all':<20}{found['seconds']:>8.2f} s{'':>6}{found['bound']:>8.2f} s{reached:>6.0%}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both types and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16)
    asked = parser.parse_args(arguments)
    demo.need()
    results.as_a_worker()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    text = load_sequences(
        demo.CALIBRATION_TEXT, tokenizer, sequences=asked.sequences, length=LENGTH, seed=0, holdout=0.0
    )
    figures: dict[str, Any] = {"sequences": asked.sequences, "length": LENGTH, "threads": 1}
    for name in ("bfloat16", "float32"):
        figures[name] = measure(name, text.tokens)
        print(f"\n{name}: seconds, share, bound, and the bound's part of the seconds")
        print("\n".join(lines(figures[name])))
    results.save("roofline", figures)


if __name__ == "__main__":
    main()
