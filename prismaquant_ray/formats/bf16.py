"""BF16: the source weight, copied byte for byte. Costs 16 bits and predicts no loss."""

from __future__ import annotations

from prismaquant_ray.formats import FormatName
from prismaquant_ray.formats.base import Format, Served

FORMAT = Format(
    name=FormatName.BF16,
    compression="dense",
    summary="the source weight, unchanged",
    letter="B",
    colours=("#5b3a94", "#ffffff"),
    served=Served(vllm_scheme="unquantized", loads_from=0, full_from=0, shape_rule="none", conditions="every server"),
)
