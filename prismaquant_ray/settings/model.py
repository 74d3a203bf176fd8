"""Which model is quantized."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prismaquant_ray.settings.values import Section


class ModelConfig(Section):
    """The model to quantize."""

    source: str = Field(
        min_length=1,
        description="Checkpoint: a local directory, an `s3://` or `gs://` URI, or a hub id. The last three are read by "
        "byte ranges.",
    )
    revision: str = Field(
        default="main",
        description="Branch, tag or commit of a hub id; workers read the commit that the driver has opened.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Blocks compute in this dtype. `auto` is bfloat16 with `cluster.device: gpu`, or with `auto` where "
        "this machine has a GPU, else float32. The run records which.",
    )
    quantize_lm_head: bool = Field(
        default=False,
        description="Quantize an untied output head like any other Linear. vLLM before 0.32 may refuse it.",
    )

    @property
    def bytes_per_value(self) -> int:
        """Bytes of a value in `dtype`, or at most, where that is not decided."""
        return 2 if self.dtype == "bfloat16" else 4
