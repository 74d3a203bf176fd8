"""How many tokens meet other experts than in the source: what prices of small changes cannot foresee."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prismaquant_ray.block_records import RoutingRecord
from prismaquant_ray.layout import Block
from prismaquant_ray.model.experts import Routing


def experts_modules(block: Block) -> tuple[str, ...]:
    """The modules of a block that hold packed experts, by path in the block."""
    packed = (matrix for group in block.groups for matrix in group.matrices if matrix.experts is not None)
    return tuple(dict.fromkeys(matrix.parameters[0].rpartition(".")[0] for matrix in packed))


class ReroutedTokens:
    """Counts of one block's tokens whose set of experts is not the source's, by row; the host never waits for them."""

    def __init__(self, block: Block, rows: int) -> None:
        self.paths = experts_modules(block)
        self.tokens = 0
        self._counts: list[Tensor | int] = [0] * rows
        self._source: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, row: int, module: nn.Module) -> Iterator[None]:
        """Count what the block of a row chooses when it runs inside the with-block; row 0, the source, comes first."""
        watched: list[Any] = [module.get_submodule(path) for path in self.paths]
        for path, experts in zip(self.paths, watched, strict=True):
            experts.watcher = self._watcher(row, path)
        try:
            yield
        finally:
            for experts in watched:
                experts.watcher = None

    def _watcher(self, row: int, path: str) -> Any:
        def watch(name: str, _: Tensor, __: Tensor, routing: Routing) -> None:
            if name != "down_proj":
                return
            # The order of a token's experts changes nothing.
            chosen = routing.chosen.sort(-1).values
            if row == 0:
                self._source[path] = chosen
                self.tokens += len(chosen)
            self._counts[row] += (chosen != self._source[path]).any(-1).sum()

        return watch

    def record(self) -> RoutingRecord:
        """The counts."""
        counts = torch.stack([torch.as_tensor(count).cpu() for count in self._counts])
        return RoutingRecord(rerouted=counts.tolist(), tokens=self.tokens)
