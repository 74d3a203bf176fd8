"""The description of a model family."""

from __future__ import annotations

from dataclasses import dataclass, field

from prismaquant_ray.spelling import Spelling


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedRule:
    """Sibling Linears the runtime fuses into one matrix named `name`; they read the same input."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertNames:
    """The repository's names of the three Linears of one expert: `experts.7.gate_proj`."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, kw_only=True, slots=True)
class Vision:
    """A vision tower: its module, and in it the list of blocks, the merger behind them, the modules before them."""

    tower: str
    blocks: str
    merger: str
    entry: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """An architecture family.

    `blocks` is the module path of the decoder's layer list. `fused` are the Linears that become one matrix in the
    runtime, `siblings` names of such matrices (or Linears) that read one input without being fused. `ignored` maps the
    last part of a module name, or a whole path inside a block, to the reason it is never quantized. `renamed` are parts
    of module names, as (in transformers, in the checkpoint). `spellings` are those of runtimes beside vLLM's own, which
    `families.serving` knows; `draft` is the prefix of a multi-token-prediction head that transformers does not load.
    """

    name: str
    architectures: tuple[str, ...]
    blocks: str
    fused: tuple[FusedRule, ...]
    siblings: tuple[tuple[str, ...], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()
    experts: ExpertNames = field(default_factory=ExpertNames)
    renamed: tuple[tuple[str, str], ...] = ()
    spellings: tuple[Spelling, ...] = ()
    vision: Vision | None = None
    draft: str | None = None

    def checkpoint_name(self, name: str) -> str:
        """The checkpoint's name of a module or tensor of transformers."""
        for ours, theirs in self.renamed:
            name = name.replace(ours, theirs)
        return name


ATTENTION = FusedRule(name="qkv_proj", members=("q_proj", "k_proj", "v_proj"))
GATED_MLP = FusedRule(name="gate_up_proj", members=("gate_proj", "up_proj"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """A kind of attention with projections of its own, as in a `Family`."""

    fused: tuple[FusedRule, ...]
    ignored: tuple[tuple[str, str], ...]


#: Multi-head latent attention. Source: DeepSeek-AI, "DeepSeek-V2" (arXiv 2405.04434), section 2.1.
LATENT = Attention(
    fused=(FusedRule(name="fused_qkv_a_proj", members=("q_a_proj", "kv_a_proj_with_mqa")),),
    ignored=(("kv_b_proj", "the runtime absorbs it into latent attention, which multiplies in 16 bits"),),
)

ROUTER = "router: a wrong expert costs more than its few bytes"
NOT_A_LINEAR = "neither a Linear nor experts that can be taken apart"
