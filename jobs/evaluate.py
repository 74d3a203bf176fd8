"""`evaluate REPO --source MODEL --text FILE`: a repository measured against the model it was made from, token by token.

Both run side by side, block by block, on the workers of a cluster. Any compressed-tensors repository will do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.events import EventLog, Events
from actors.progress import progress
from jobs import inputs
from jobs.evaluation import Bench
from jobs.measure import OpenWorkers, ray_crew
from prismaquant_ray.calibration.files import read_text
from prismaquant_ray.compressed.view import RepositoryView
from prismaquant_ray.config import Config, checked
from prismaquant_ray.errors import InputError
from prismaquant_ray.evaluation.variants import Variant
from prismaquant_ray.layout import BlockKind, Layout
from prismaquant_ray.model.layout_builder import build_layout, scope_of
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.source.resolve import local_files
from prismaquant_ray.storage.lease import held
from prismaquant_ray.storage.store import Store, existing

ROWS = {"weights": "weights rounded", "activations": "weights and activations rounded"}


def run(
    repository: str,
    source: str,
    text: Path,
    *,
    images: Path | None = None,
    sequences: int = 24,
    length: int = 512,
    store: str | None = None,
    overrides: Sequence[str] = (),
    open_workers: OpenWorkers = ray_crew,
) -> dict[str, Any]:
    """Measure `repository` against `source` on a text (and images).

    `store` keeps what several machines must share, and what an interrupted evaluation continues from; a temporary
    directory takes its place. `overrides` are settings of the configuration's model, cluster and calibration.
    """
    with _place(store) as place:
        config = _config(source, text, images, place, overrides)
        original = inputs.open_source(config.model)
        view = RepositoryView(existing(repository))
        _, layout = build_layout(original, scope_of(config))
        kinds = _check_same_model(original, layout, view)
        if images is not None and layout.image_token is None:
            raise InputError(f"--images is given, but {layout.architecture} has no vision tower that is known here")
        tokens = inputs.load_tokens(
            original,
            layout,
            text,
            images,
            sequences=sequences,
            length=length,
            seed=config.calibration.seed,
            holdout=0.0,
        )
        caveats = [*view.caveats, *_check_tokenizer(original, view, text)]
        if layout.of(BlockKind.DRAFT) and BlockKind.DRAFT not in kinds:
            caveats.append("the repository has no draft head; the source's was not measured")
        kept = Store(place)
        with held(kept) as lease, progress() as shown:
            log = EventLog(kept)
            bench = Bench(
                config=config,
                source=original,
                layout=layout,
                tokens=tokens,
                store=kept,
                events=Events(log, shown),
                check=lease.check,
                open_workers=open_workers,
                repository=view,
                drafts=BlockKind.DRAFT in kinds,
            )
            variants = [Variant(choice=None, activations=activations) for activations in (False, True)]
            try:
                found = bench.measure(variants)
            finally:
                log.flush()
    reference, weights, activations = found
    return {
        "repository": repository,
        "source": source,
        "text": {"file": str(text), "sequences": tokens.texts, "length": length, "images": len(tokens.images)},
        "formats": dict(view.formats),
        "bits": _bits(view),
        "source_figures": {
            key: reference[key] for key in ("loss", "perplexity", "draft_agreement") if key in reference
        },
        "weights": weights,
        "activations": activations,
        "notes": caveats,
    }


def render(result: dict[str, Any], console: Console) -> None:
    """The figures as a table, then what must be known of them."""
    formats = ", ".join(f"{count} {name}" for name, count in result["formats"].items()) or "nothing quantized"
    bits, text = result["bits"], result["text"]
    console.print(f"{result['repository']}: {formats}", soft_wrap=True)
    quantized = "" if bits["quantized_linears"] is None else f"{bits['quantized_linears']:.4f} of quantized Linears, "
    console.print(
        f"bits per parameter: {quantized}{bits['all_parameters']:.3f} of all parameters, {bits['files']:.3f} with "
        "every byte of every file",
        soft_wrap=True,
    )
    images = f" and {text['images']} images" if text["images"] else ""
    console.print(
        f"against {result['source']} on {text['sequences']} × {text['length']} tokens{images}:", soft_wrap=True
    )
    table = Table(box=None, pad_edge=False)
    for title in ("", "KL nats/token", "±", "90 %", "99 %", "same top-1", "perplexity", "draft agrees"):
        table.add_column(title, justify="left" if not title else "right")
    reference = result["source_figures"]
    table.add_row("source", "", "", "", "", "", f"{reference['perplexity']:.4f}", _share(reference))
    for key, title in ROWS.items():
        row = result[key]
        table.add_row(
            title,
            f"{row['kl_mean']:.6f}",
            f"{row['kl_standard_error']:.6f}",
            f"{row['kl_p90']:.5f}",
            f"{row['kl_p99']:.5f}",
            f"{row['top1_agreement']:.2%}",
            f"{row['perplexity']:.4f}",
            _share(row),
        )
    console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _share(row: dict[str, Any]) -> str:
    return f"{row['draft_agreement']:.2%}" if "draft_agreement" in row else ""


@contextmanager
def _place(store: str | None) -> Iterator[str]:
    if store is not None:
        yield store
        return
    with tempfile.TemporaryDirectory(prefix="prismaquant-evaluate-") as directory:
        yield directory


def _config(source: str, text: Path, images: Path | None, place: str, overrides: Sequence[str]) -> Config:
    """The configuration of a run, of which an evaluation reads model, cluster and microbatch."""
    body = {
        "model": {"source": source},
        "calibration": {"text": str(text), "images": None if images is None else str(images)},
        "budget": {"bpp": 16.0},
        "store": {"run": place, "output": f"{place.rstrip('/')}-output"},
    }
    return checked(body, overrides, name="evaluate")


def _check_same_model(source: TensorSource, layout: Layout, view: RepositoryView) -> set[BlockKind]:
    """The kinds of blocks that the repository has; InputError unless what it has is what the source has.

    It may do without a draft head, which transformers does not save.
    """
    found: set[BlockKind] = set()
    parts = [(None, (*layout.embedding, *layout.pixels, *layout.head)), *((b.kind, b.tensors) for b in layout.blocks)]
    for kind, names in parts:
        missing = next((name for name in names if name not in view.tensors), None)
        if missing is not None and kind is not BlockKind.DRAFT:
            raise InputError(
                f"{view.store.uri} has no {missing}, which {source.store.uri} has; it was made from another model"
            )
        for name in names if missing is None else ():
            ours, theirs = source.tensors[name].shape, view.tensors[name].shape
            if ours != theirs:
                raise InputError(
                    f"{view.store.uri}: {name} is {theirs}, in {source.store.uri} it is {ours}; it was made from "
                    "another model"
                )
        if missing is None and kind is not None:
            found.add(kind)
    return found


def _check_tokenizer(source: TensorSource, view: RepositoryView, text: Path) -> list[str]:
    """InputError unless both tokenizers read the text alike; a note when the repository has none."""
    if not any(name.startswith(("tokenizer", "vocab")) for name in view.other_files()):
        return ["the repository has no tokenizer of its own; the source's was used"]
    sample = read_text(text, "The evaluation text")
    ids = []
    for checkpoint in (source, view):
        with local_files(checkpoint) as directory:
            tokenizer = inputs.load_tokenizer(checkpoint, directory)
            ids.append(tokenizer(sample, verbose=False)["input_ids"])
    if ids[0] != ids[1]:
        position = next((i for i, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1]), min(map(len, ids)))
        raise InputError(
            f"{view.store.uri} and {source.store.uri} have different tokenizers: they read {text} as {len(ids[1]):,} "
            f"and {len(ids[0]):,} tokens, different from token {position} on; evaluate with the source it was made from"
        )
    return []


def _bits(view: RepositoryView) -> dict[str, float | None]:
    """Bits per parameter, by three denominators."""
    sizes = view.sizes()
    return {
        "quantized_linears": 8 * sizes.linear_bytes / sizes.linear_parameters if sizes.linear_parameters else None,
        "all_parameters": 8 * sizes.tensor_bytes / sizes.parameters,
        "files": 8 * sizes.file_bytes / sizes.parameters,
    }
