"""Routed experts: our own forward for transformers' packed experts, so that their inputs can be captured.

transformers lets a model's experts be computed by any registered function. This one sorts rows by expert, multiplies
all experts' rows by their matrices at once, and sums in the router's order, so that results are deterministic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMPLEMENTATION = "routed"


@dataclass(frozen=True, eq=False)
class Routing:
    """Which rows go to which expert.

    `chosen` (tokens, top_k) are the router's expert numbers. A row is one (token, choice) pair, sorted by expert: row i
    is pair `order[i]`, and the first `counts[0]` rows are expert 0's.
    """

    chosen: Tensor
    order: Tensor
    counts: Tensor

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> Routing:
        """From the router's choice."""
        flat = chosen.reshape(-1)
        # Not bincount, which has the host wait for the largest number.
        counts = torch.zeros(experts, dtype=torch.int64, device=flat.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int64))
        return cls(chosen, torch.argsort(flat, stable=True), counts)

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self.chosen.shape[1]

    @functools.cached_property
    def ends(self) -> Tensor:
        """Where each expert's rows end (E,), int32."""
        return self.counts.cumsum(0, dtype=torch.int32)

    @functools.cached_property
    def own(self) -> Tensor:
        """Whether a row is an expert's (E, rows)."""
        row = torch.arange(len(self.order), device=self.order.device)
        ends = self.ends.unsqueeze(1)
        return (row < ends) & (row >= ends - self.counts.unsqueeze(1))

    @functools.cached_property
    def sizes(self) -> list[int]:
        """The counts, for which the host waits."""
        sizes: list[int] = self.counts.tolist()
        return sizes

    @property
    def expert(self) -> Tensor:
        """The expert of each row."""
        return self.chosen.reshape(-1)[self.order]

    @property
    def token(self) -> Tensor:
        """The token of each row."""
        return self.order // self.top_k

    @property
    def first(self) -> Tensor:
        """The row of each token's first choice."""
        return torch.argsort(self.order)[:: self.top_k]

    def to_tokens(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Sum of each token's rows along a dimension: (rows, …) → (tokens, …), in the router's order."""
        pairs = torch.empty_like(rows).index_copy_(dim, self.order, rows)
        total: Tensor = pairs.unflatten(dim, (-1, self.top_k)).sum(dim + 1)
        return total


#: Called with the parameter's name, its input rows (R, I), its output rows (R, O), and their routing.
Watcher = Callable[[str, Tensor, Tensor, Routing], None]
#: Functions applied to the input rows (R, I) of a packed parameter, by its name; the module's attribute `roundings`.
Roundings = Mapping[str, Callable[[Tensor], Tensor]]


def routed_forward(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Output (tokens, H) of an experts module of transformers for hidden (tokens, H) and the router's choice."""
    if hidden.is_meta:
        return torch.empty_like(hidden)  # asked for shapes only
    routing = Routing.of(chosen, module.num_experts)
    watch: Watcher | None = getattr(module, "watcher", None)
    rows = hidden[routing.token]
    projected = _linear(module, "gate_up_proj", rows, routing, watch)
    down = _linear(module, "down_proj", module._apply_gate(projected), routing, watch)
    weighted = down * weights.reshape(-1)[routing.order].unsqueeze(-1)
    return routing.to_tokens(weighted).to(hidden.dtype)


def register() -> None:
    """Make `routed_forward` known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, routed_forward)


def is_packed(module: nn.Module) -> bool:
    """Whether a module holds experts as packed (experts, rows, columns) parameters and runs by a registered function.

    A few models (Llama 4) pack their experts but compute them by their own code, which cannot be captured.
    """
    packed = all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in ("gate_up_proj", "down_proj"))
    return packed and hasattr(module, "is_concatenated")


def unquantizable(module: Any) -> str | None:
    """Why packed experts cannot be written as Linears of one expert each, or None."""
    if module.has_bias:
        # vLLM 0.32 makes biases for experts in 16 bits and INT4 only, and passes over those it has no place for.
        return "experts with biases: vLLM's NVFP4, MXFP4, MXFP8 and FP8 experts have none, and would leave them out"
    if module.is_transposed or not module.is_concatenated or not module.has_gate:
        return "experts with interleaved rows: the runtime reads no quantized Linears of them"
    return None


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x Wᵀ (R, O) in x's type, where the first ends[0] rows of x (R, I) meet weight[0] of (E, O, I), and so on."""
    # Starts of rows must be aligned for a GPU's kernel; and a stack in another type would take its memory once more.
    fits = all(width * rows.itemsize % 16 == 0 for width in weight.shape[1:])
    if fits and weight.dtype == rows.dtype:
        product: Tensor = F.grouped_mm(rows, weight.mT, offs=ends)
        return product
    pieces = enumerate(rows.tensor_split(ends[:-1].cpu()))
    return torch.cat([F.linear(piece, weight[expert].to(rows.dtype)) for expert, piece in pieces if len(piece)])


def _linear(module: Any, name: str, rows: Tensor, routing: Routing, watch: Watcher | None) -> Tensor:
    weight = getattr(module, name)
    roundings: Roundings = getattr(module, "roundings", {})
    if name in roundings:
        rows = roundings[name](rows)
    output = grouped_product(rows, weight.mT if module.is_transposed else weight, routing.ends)
    if module.has_bias:
        output = output + getattr(module, f"{name}_bias").repeat_interleave(
            routing.counts, dim=0, output_size=len(rows)
        )
    if watch is not None:
        watch(name, rows, output, routing)
    return output
