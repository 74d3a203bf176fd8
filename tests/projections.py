"""p of every token, as a backward backward multiplies it; nothing of it is stored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from prismaquant_ray.backward.block import BlockBackward
from prismaquant_ray.backward.pricing import Passed
from prismaquant_ray.formats import FormatName
from prismaquant_ray.model.capture import CapturedActivations


class Recorded:
    """p of what a backward prices from now on, by group and format."""

    def __init__(self, backward: BlockBackward) -> None:
        self._pieces: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        projections = backward.pricing.projections

        def recording(
            captured: CapturedActivations, passed: Mapping[str, Passed]
        ) -> dict[tuple[str, FormatName], Tensor]:
            found = projections(captured, passed)
            for (group, name), parts in found.items():
                self._pieces[group, str(name)].append(parts[0] + parts[1])
            return found

        backward.pricing.projections = recording  # type: ignore[method-assign]

    def of(self, group: str, name: str) -> Tensor:
        """(tokens of all microbatches,) float32."""
        return torch.cat(self._pieces[group, name])

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._pieces
