"""What vLLM says of its own model classes: which Linears it fuses, and how it spells modules.

The table, `vllm.json`, is data read from an installed vLLM: `make serving-names` makes it anew. What only loading shows
is written down here; `make vllm` loads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from prismaquant_ray.parsing import parse_json
from prismaquant_ray.spelling import Renames, Spelling


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerNames:
    """How vLLM serves an architecture.

    `fused` are the members of each Linear that it makes of several, `kept` Linears that it cannot have quantized, with
    the reason, as in a `Family`; `spellings` are its names for the checkpoint's modules. With `through_transformers` it
    runs transformers' own code, fuses Linears that read one tensor, and calls the base model `model`.
    """

    runtime: str
    fused: Mapping[str, tuple[str, ...]]
    kept: tuple[tuple[str, str], ...]
    spellings: tuple[Spelling, ...]
    through_transformers: bool


_PLAIN = "vLLM builds this layer without quantization"
_MAMBA = (("in_proj", _PLAIN), ("x_proj", _PLAIN), ("dt_proj", _PLAIN), ("out_proj", _PLAIN))
_UNMAPPED = "vLLM fuses it with others and does not tell its quantization"
_OTHER_LAYER = "vLLM's quantization knows it by the number of another layer"
# What no repository can change, by architecture.
_KEPT: Mapping[str, tuple[tuple[str, str], ...]] = {
    "BloomForCausalLM": (("query_key_value", "vLLM sorts its rows by heads, and cannot sort those of packed weights"),),
    "FalconH1ForCausalLM": (("mamba.in_proj", _OTHER_LAYER), ("mamba.out_proj", _OTHER_LAYER)),
    "FalconMambaForCausalLM": _MAMBA,
    "GPTJForCausalLM": (("q_proj", _UNMAPPED), ("k_proj", _UNMAPPED), ("v_proj", _UNMAPPED)),
    "JambaForCausalLM": tuple((f"mamba.{name}", reason) for name, reason in _MAMBA),
    "MambaForCausalLM": _MAMBA,
}
# Names that its quantization has for a layer whose weights are called otherwise.
_SPELLINGS: Mapping[str, tuple[Spelling, ...]] = {
    "FalconH1ForCausalLM": (Spelling(parts=((".self_attn.", "."),)),),
    "MiniMaxM2ForCausalLM": (Spelling(parts=((".block_sparse_moe.", ".mlp."),)),),
    "GraniteMoeHybridForCausalLM": (Spelling(parts=((".mamba.", ".mixer."),)),),
}


def server_names(architecture: str) -> ServerNames | None:
    """How vLLM serves an architecture (a class name of transformers); None where the table does not know."""
    table = _table()
    entry: Mapping[str, Any] | None = table["architectures"].get(architecture)
    # Of some classes it has only why they could not be imported.
    if entry is None or "unreadable" in entry:
        return None
    return ServerNames(
        runtime=f"vLLM {table['vllm']}",
        fused={name: tuple(members) for name, members in entry.get("fused", {}).items()},
        kept=_KEPT.get(architecture, ()),
        spellings=(
            Spelling(**{kind: _renames(entry.get(kind, ())) for kind in Spelling.__slots__}),
            *_SPELLINGS.get(architecture, ()),
        ),
        through_transformers="through" in entry,
    )


def _renames(pairs: Any) -> Renames:
    return tuple((old, new) for old, new in pairs)


@functools.cache
def _table() -> Any:
    return parse_json(resources.files(__package__).joinpath("vllm.json").read_bytes())
