"""Probe and cost against one plain forward over the same tokens: `python -m benchmarks.probe`.

The plain forward is that of transformers, with logits, without gradients. The probe is the forward pass block by block,
the exits with sampled labels, and the backward pass that prices NVFP4 and MXFP8 of every Linear from stored candidates,
loading and decoding included. Statistics and rounding are no part of it. Both run in this process, which has a worker's
environment, one after the other, on the same microbatches, in the same type; shown are medians of CPU seconds and the
median of their ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import demo, results
from prismaquant_ray.backward.block import BlockBackward
from prismaquant_ray.backward.loss import Loss
from prismaquant_ray.backward.price import Split
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.text import load_sequences
from prismaquant_ray.formats import FormatName
from prismaquant_ray.forward.block import BlockForward
from prismaquant_ray.forward.encode import Rounding
from prismaquant_ray.forward.scale_search import ScaleSearch
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store

LENGTH, MICROBATCH = 512, 4
FORMATS = (FormatName.NVFP4, FormatName.MXFP8, FormatName.BF16)
Candidates = dict[int, dict[FormatName, dict[str, Tensor]]]


class Probe:
    """Both passes over some tokens, with every boundary in memory."""

    def __init__(self, tokens: Tensor, dtype: torch.dtype) -> None:
        self.runner = ModelRunner(Checkpoint(Store(demo.MODEL)), dtype=dtype, device=torch.device("cpu"))
        calibration = CalibrationSet(tokens=tokens, holdout=torch.zeros(len(tokens), dtype=torch.bool))
        self.split = Split.of(calibration)
        self.batches = calibration.batches(MICROBATCH)
        self.blocks = range(len(self.runner.layout.blocks))
        self.loss = Loss(labels="sampled", seed=0, vocab_size=self.runner.layout.vocab_size)

    def candidates(self) -> Candidates:
        """Of every block, by plain rounding: what they are does not matter here."""
        found: Candidates = {}
        rounding = Rounding(scale_search=ScaleSearch(grid=2), gptq=None)
        batch = self.batches[0]
        with torch.no_grad(), self.runner.entry():
            hidden = self.runner.embed(batch.inputs)
        for index in self.blocks:
            block_pass = BlockForward(self.runner, index, FORMATS, rounding)
            hidden = block_pass.run(hidden, batch)
            found[index] = block_pass.finish().tensors
        return found

    def run(self, candidates: Candidates) -> None:
        """Price every candidate."""
        with torch.no_grad(), self.runner.entry():
            boundaries = [[self.runner.embed(batch.inputs) for batch in self.batches]]
        for index in self.blocks:
            block_pass = BlockForward(self.runner, index, (), Rounding())
            boundaries.append([block_pass.run(h, batch) for h, batch in zip(boundaries[-1], self.batches, strict=True)])
        self.price(boundaries, candidates)

    def price(self, boundaries: list[list[Tensor]], candidates: Candidates) -> None:
        """Exits and the backward pass, from what left every block; the boundaries are used up."""
        with self.runner.exit():
            hidden = zip(boundaries.pop(), self.batches, strict=True)
            gradients = [self.loss.gradient(self.runner.logits, h, batch)[0] for h, batch in hidden]
        for index in reversed(self.blocks):
            backward = BlockBackward(self.runner, index, FORMATS, candidates[index])
            for place, (h, batch) in enumerate(zip(boundaries.pop(), self.batches, strict=True)):
                backward.forward(h, batch)
                gradients[place] = backward.backward(gradients[place], batch)
            backward.finish(self.split)


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """CPU and wall seconds."""
    begun = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - begun[0], time.perf_counter() - begun[1]


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    demo.need()
    results.as_a_worker()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    text = load_sequences(
        demo.CALIBRATION_TEXT, tokenizer, sequences=arguments.sequences, length=LENGTH, seed=0, holdout=0.0
    )
    figures: dict[str, Any] = {"sequences": arguments.sequences, "length": LENGTH, "threads": arguments.threads}
    print("dtype       plain forward  probe + cost  ratio (CPU seconds, medians)")
    for name in ("float32", "bfloat16"):
        probe = Probe(text.tokens, getattr(torch, name))
        candidates = probe.candidates()
        model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=getattr(torch, name)).eval()

        @torch.no_grad()
        def plain(model: Any = model, probe: Probe = probe) -> None:
            for batch in probe.batches:
                model(**batch.inputs, use_cache=False)

        pairs = [(seconds(plain), seconds(lambda: probe.run(candidates))) for _ in range(arguments.repeats)]  # noqa: B023
        forward, ours = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(pair[1][0] / pair[0][0] for pair in pairs)
        figures[name] = {
            "plain_cpu": forward,
            "probe_cpu": ours,
            "ratio": ratio,
            "ratios": [pair[1][0] / pair[0][0] for pair in pairs],
            "plain_wall": statistics.median(pair[0][1] for pair in pairs),
            "probe_wall": statistics.median(pair[1][1] for pair in pairs),
        }
        print(f"{name:<12}{forward:>10.1f} s{ours:>12.1f} s{ratio:>7.2f}")
    results.save("probe", figures)


if __name__ == "__main__":
    main()
