"""Inputs of a layer's experts, kept until every microbatch is in.

A Hessian for each of hundreds of experts would not fit; one hidden state per token and the router's choices do. At the
end experts are processed in chunks: gather rows, compute Hessians, encode.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prismaquant_ray.forward.equalize import Reading
from prismaquant_ray.forward.kept_rows import spaced
from prismaquant_ray.forward.statistics import InputStatistics, InputSums, Prior, divided
from prismaquant_ray.model.experts import Routing, grouped_product

# Float32 elements of Hessians that are held at a time.
HESSIANS = 1 << 27


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ExpertsAtOnce:
    """Experts start..stop with the statistics of both of their inputs, by parameter.

    `inner` is what equalizing the second one needs, but for weights.
    """

    start: int
    stop: int
    statistics: dict[str, InputStatistics]
    inner: Reading


class RoutedInputs:
    """Inputs of one experts module: routed hidden states of `gate_up_proj`, gated activations of `down_proj`."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self.module = module
        experts, _, width = module.gate_up_proj.shape
        self.tokens_of = torch.zeros(experts, dtype=torch.int64, device=device)
        # Every row counts the same in a layer's mean, so it is summed like a dense input.
        self.pooled = {
            "gate_up_proj": InputSums(width, device),
            "down_proj": InputSums(module.down_proj.shape[2], device),
        }
        self._hidden: list[Tensor] = []
        self._chosen: list[Tensor] = []
        self._held_out: list[Tensor] = []

    def add(self, rows: Tensor, inner: Tensor, routing: Routing, held_out: Tensor) -> None:
        """A microbatch: rows (R, H) and inner (R, I) sorted by expert, held_out (sequences,) bool on the CPU."""
        hidden = rows[routing.first]
        self.pooled["gate_up_proj"].add(*divided(hidden.unflatten(0, (len(held_out), -1)), held_out))
        held = torch.zeros(len(held_out), len(hidden) // len(held_out), dtype=torch.bool, device=rows.device)
        for sequence in torch.nonzero(held_out).flatten().tolist():
            held[sequence] = True
        # Rows held out go behind the others: how many there are is known, and a mask would have the host wait for it.
        behind = torch.argsort(held.flatten()[routing.token].to(torch.uint8), stable=True)
        judging = int(held_out.sum()) * held.shape[1] * routing.top_k
        self.pooled["down_proj"].add(*inner[behind].split([len(inner) - judging, judging]))
        self.tokens_of += routing.counts
        self._hidden.append(hidden)
        self._chosen.append(routing.chosen)
        self._held_out.append(held.flatten())

    def hidden(self) -> tuple[InputStatistics, Tensor]:
        """Statistics of the layer's input, and some rows of it (N, H) float32, held out if any were."""
        hidden, held_out = torch.cat(self._hidden), torch.cat(self._held_out)
        return self.pooled["gate_up_proj"].statistics(), hidden[_judging(held_out)].float()

    def chunks(self) -> Iterator[ExpertsAtOnce]:
        """Experts in order, as many at a time as a constant number of Hessian elements allows."""
        hidden, chosen, held_out = torch.cat(self._hidden), torch.cat(self._chosen), torch.cat(self._held_out)
        self._hidden = [hidden]
        top_k = chosen.shape[1]
        flat = chosen.flatten()
        pooled = {name: sums.statistics() for name, sums in self.pooled.items()}
        priors = {name: Prior.of(statistics) for name, statistics in pooled.items()}
        experts, _, width = self.module.gate_up_proj.shape
        at_once = max(1, HESSIANS // max(width, self.module.down_proj.shape[2]) ** 2)
        order = torch.argsort(flat, stable=True)
        ends = [0, *itertools.accumulate(self.tokens_of.tolist())]
        for start in range(0, experts, at_once):
            stop = min(start + at_once, experts)
            token = order[ends[start] : ends[stop]] // top_k
            counts = self.tokens_of[start:stop]
            rows, held = hidden[token], held_out[token]
            inner = self._inner(rows, counts, start, stop)
            statistics = {
                name: InputStatistics.routed(x, counts, held, priors[name])
                for name, x in (("gate_up_proj", rows), ("down_proj", inner))
            }
            kept, expert = _judging(held), torch.repeat_interleave(counts, output_size=len(held))
            of_inner = Reading(
                importance=statistics["down_proj"].importance,
                amax=statistics["down_proj"].amax,
                rows=inner[kept].float(),
                expert=expert[kept],
                weights=(),
            )
            yield ExpertsAtOnce(start=start, stop=stop, statistics=statistics, inner=of_inner)

    def _inner(self, rows: Tensor, counts: Tensor, start: int, stop: int) -> Tensor:
        """Recompute the input of `down_proj`: keeping it would take top_k times the memory."""
        if not len(rows):
            return rows.new_zeros(0, self.module.down_proj.shape[2])
        projected = grouped_product(rows, self.module.gate_up_proj[start:stop], counts.cumsum(0, dtype=torch.int32))
        inner: Tensor = self.module._apply_gate(projected)
        return inner


def _judging(held_out: Tensor) -> Tensor:
    """Numbers of some rows that are held out (rows,), evenly spaced; of any rows where none is."""
    order = torch.argsort(held_out.to(torch.uint8), stable=True, descending=True)
    judging = int(held_out.sum()) or len(held_out)
    return order[spaced(judging)]
