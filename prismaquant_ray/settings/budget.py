"""How large the result may be."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from prismaquant_ray.settings.values import Bytes, Margin, Section

#: Kinds of budget; exactly one is given.
BUDGETS = ("bpp", "bytes", "vram")


class BudgetConfig(Section):
    """The size of the result: exactly one of `bpp`, `bytes` and `vram`. docs/budgets.md has the arithmetic."""

    bpp: float | None = Field(default=None, gt=0.0, description="Bits per quantizable parameter, scales included.")
    bytes: Bytes | None = Field(default=None, description="Bytes of the whole repository.")
    vram: Bytes | None = Field(
        default=None, description="Memory of the GPUs of one server: weights as loaded, KV cache and margin."
    )
    context: int | None = Field(
        default=None,
        ge=1,
        description="Tokens per sequence in the KV cache. Required by `vram`; with the other kinds the plan states "
        "its GPU memory.",
    )
    sequences: int = Field(default=1, ge=1, description="Sequences in the KV cache.")
    margin: Margin = Field(
        default=0.15, description="Memory kept free for everything else: a share of the GPU memory, or bytes."
    )

    @model_validator(mode="before")
    @classmethod
    def _moved(cls, body: Any) -> Any:
        if isinstance(body, dict) and "kv_cache" in body:
            raise ValueError("kv_cache is a setting of its own now; write kv_cache: fp8 beside budget, not in it")
        return body

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if sum(getattr(self, kind) is not None for kind in BUDGETS) != 1:
            raise ValueError("give exactly one of bpp, bytes and vram")
        fields = type(self).model_fields
        given = (name for name in ("sequences", "margin") if getattr(self, name) != fields[name].default)
        if self.context is None and (self.vram is not None or any(given)):
            raise ValueError("context is missing: the KV cache is computed for so many tokens of every sequence")
        return self

    @property
    def target(self) -> str:
        """Its name in the run store, e.g. 5.5bpp."""
        if self.vram is not None:
            return f"{self.vram}B-vram-{self.sequences}x{self.context}"
        return f"{self.bpp:g}bpp" if self.bpp is not None else f"{self.bytes}B"
