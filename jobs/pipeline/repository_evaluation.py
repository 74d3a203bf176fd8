"""Measuring any compressed-tensors repository against its source model, token by token.

Both run side by side, block by block, on the workers of a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from jobs.pipeline import checks, sources
from jobs.pipeline.evaluation import EvaluationSession, source_figures
from jobs.pipeline.workers import OpenWorkers, ray_workers
from prismaquant_ray.calibration.dataset import CalibrationSet
from prismaquant_ray.calibration.reading import GivenText, TextReader
from prismaquant_ray.calibration.text import token_ids
from prismaquant_ray.compressed.view import RepositoryView
from prismaquant_ray.config import Config, checked
from prismaquant_ray.errors import InputError
from prismaquant_ray.evaluation.variants import Variant
from prismaquant_ray.event_log import EventLog
from prismaquant_ray.events import Events, Listener, Notice
from prismaquant_ray.layout import BlockKind, Layout
from prismaquant_ray.model.layout_builder import build_layout, scope_of
from prismaquant_ray.records import Divergence, SourceFigures, TakenText
from prismaquant_ray.settings.data import EvaluationConfig
from prismaquant_ray.settings.texts import MIX_ALL, PYTHON, TextSource
from prismaquant_ray.source.protocol import TensorSource
from prismaquant_ray.source.resolve import local_files
from prismaquant_ray.storage.lease import held
from prismaquant_ray.storage.store import Store, existing


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFigures:
    """The text: `sequences` of `length` tokens, what was taken of each source, and the number of images."""

    file: str
    sequences: int
    length: int
    images: int
    sources: tuple[TakenText, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bits:
    """Bits per parameter: of quantized Linears (None without any), of all tensors, and of all files."""

    quantized_linears: float | None
    all_parameters: float
    files: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedRepository:
    """Divergence of a repository from its source: with decoded weights, and with rounded activations too.

    `formats` counts modules by format; `notes` are caveats of the figures; `missed` says which limits were missed.
    """

    repository: str
    source: str
    text: TextFigures
    formats: dict[str, int]
    bits: Bits
    source_figures: SourceFigures
    weights: Divergence
    activations: Divergence
    notes: list[str]
    missed: list[str]

    @property
    def exit_code(self) -> int:
        """4 where a limit was missed: the figures are there, and say that the repository is not good enough."""
        return 4 if self.missed else 0


def evaluate(
    repository: str,
    source: str,
    text: Path | str | GivenText = MIX_ALL,
    *,
    images: Path | None = None,
    sequences: int = 24,
    length: int = 512,
    store: str | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    overrides: Sequence[str] = (),
    on_event: Listener | None = None,
    open_workers: OpenWorkers = ray_workers,
) -> EvaluatedRepository:
    """KL, perplexity and top-1 agreement of any compressed-tensors repository against its source, on a text.

    `text` is a source as in `evaluation.text`, or rows: texts, or mappings as the lines of a `.jsonl`. It measures
    `sequences` of `length` tokens, and `images`, a JSONL file with captions. `store` is shared by all machines, and an
    interrupted evaluation continues from it; the default is a temporary directory. `max_kl` (nats per token) and
    `min_top1` (a share) are limits for the figures with rounded weights and activations, which a server computes with;
    `missed` names those that do not hold. `overrides` are settings of model, cluster and calibration, e.g.
    `cluster.workers=8`.

    Raises:
        InputError: an input cannot be read, or the repository was made from another model.
    """
    _check_limits(max_kl, min_top1)
    chosen = _source_of(text)
    reader = TextReader(evaluation=None if isinstance(text, str | Path) else text)
    with nullcontext(store) if store is not None else TemporaryDirectory(prefix="prismaquant-evaluate-") as place:
        config = _config(source, images, place, overrides)
        original = sources.open_source(config.model, say=_noticed(on_event))
        view = RepositoryView(existing(repository))
        _, layout = build_layout(original, scope_of(config))
        kinds = _check_same_model(original, layout, view)
        if images is not None and layout.image_token is None:
            raise InputError(f"--images is given, but {layout.architecture} has no vision tower that is known here")
        data = EvaluationConfig(text=(chosen,), images=images, sequences=sequences, length=length)
        tokens = sources.load_tokens(original, layout, data, reader, seed=config.calibration.seed)
        drafts = BlockKind.DRAFT in kinds
        notes = [*view.caveats, *_check_tokenizer(original, view, chosen, sources.read_evaluation(data, reader))]
        if layout.of(BlockKind.DRAFT) and not drafts:
            notes.append("the repository has no draft head; the source's was not measured")
        with _session(config, original, layout, tokens, view, drafts, on_event, open_workers) as session:
            reference, weights, activations = session.measure(
                [Variant(choice=None, activations=activations) for activations in (False, True)]
            )
    return EvaluatedRepository(
        repository=repository,
        source=source,
        text=_text_figures(chosen, tokens),
        formats=dict(view.formats),
        bits=_bits(view),
        source_figures=source_figures(reference),
        weights=weights,
        activations=activations,
        notes=notes,
        missed=_missed(activations, max_kl, min_top1),
    )


def _noticed(on_event: Listener | None) -> Callable[[str], None] | None:
    """What tells a listener a sentence."""
    return None if on_event is None else lambda message: on_event(Notice(message=message))


def _text_figures(chosen: TextSource, tokens: CalibrationSet) -> TextFigures:
    return TextFigures(
        file=chosen.path if chosen.is_file else chosen.name,
        sequences=tokens.texts,
        length=tokens.tokens.shape[1],
        images=len(tokens.images),
        sources=tokens.sources,
    )


def _check_limits(max_kl: float | None, min_top1: float | None) -> None:
    if max_kl is not None and not 0.0 <= max_kl < math.inf:
        raise InputError(f"a limit of {max_kl} on KL is none; give nats per token, e.g. 0.1")
    if min_top1 is not None and not 0.0 <= min_top1 <= 1.0:
        raise InputError(f"a limit of {min_top1} on the same top-1 is none; give a share of tokens, e.g. 0.9")


def _missed(found: Divergence, max_kl: float | None, min_top1: float | None) -> list[str]:
    missed = []
    if max_kl is not None and not found.kl_mean <= max_kl:
        figure = f"{found.kl_mean:.6f} ± {found.kl_standard_error:.6f}"
        missed.append(f"KL is {figure} nats per token, at most {max_kl:g} wanted")
    if min_top1 is not None and not found.top1_agreement >= min_top1:
        missed.append(f"{found.top1_agreement:.2%} of tokens have the same top-1, at least {min_top1:.2%} wanted")
    return missed


@contextmanager
def _session(
    config: Config,
    source: TensorSource,
    layout: Layout,
    text: CalibrationSet,
    repository: RepositoryView,
    drafts: bool,
    on_event: Listener | None,
    open_workers: OpenWorkers,
) -> Iterator[EvaluationSession]:
    """A session with the lease of its store, and with its event log there."""
    store = Store(config.store.run)
    with held(store) as lease:
        log = EventLog(store)
        events = Events(log) if on_event is None else Events(log, on_event)
        events(sources.texts_read("evaluation", text))
        try:
            yield EvaluationSession(
                config=config,
                source=source,
                layout=layout,
                text=text,
                store=store,
                events=events,
                check=lease.check,
                open_workers=open_workers,
                repository=repository,
                drafts=drafts,
            )
        finally:
            log.flush()


def _source_of(text: Path | str | GivenText) -> TextSource:
    """The source that an argument names; InputError for a name that is none."""
    path = str(text) if isinstance(text, str | Path) else PYTHON
    try:
        return TextSource(path=path)
    except ValidationError as error:
        raise InputError(f"the text {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def _config(source: str, images: Path | None, place: str, overrides: Sequence[str]) -> Config:
    """A configuration; an evaluation uses its model, cluster and microbatch."""
    body = {
        "model": {"source": source},
        "calibration": {"images": None if images is None else str(images)},
        "budget": {"bpp": 16.0},
        "store": {"run": place, "output": f"{place.rstrip('/')}-output"},
    }
    return checks.with_dtype(checked(body, overrides, name="evaluate"))


def _check_same_model(source: TensorSource, layout: Layout, view: RepositoryView) -> set[BlockKind]:
    """The kinds of blocks in the repository; InputError unless names and shapes are the source's.

    A draft head may be missing: transformers does not save it.
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


def _check_tokenizer(source: TensorSource, view: RepositoryView, text: TextSource, sample: str) -> list[str]:
    """Raise InputError unless both tokenizers give the same tokens; a note if the repository has none."""
    if not any(name.startswith(("tokenizer", "vocab")) for name in view.other_files()):
        return ["the repository has no tokenizer of its own; the source's was used"]
    ids = []
    for checkpoint in (source, view):
        with local_files(checkpoint) as directory:
            tokenizer = sources.load_tokenizer(checkpoint, directory)
            ids.append(token_ids(tokenizer, sample))
    if ids[0] != ids[1]:
        position = next((i for i, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1]), min(map(len, ids)))
        raise InputError(
            f"{view.store.uri} and {source.store.uri} have different tokenizers: they read {text.name} as "
            f"{len(ids[1]):,} and {len(ids[0]):,} tokens, different from token {position} on; evaluate with the source "
            "it was made from"
        )
    return []


def _bits(view: RepositoryView) -> Bits:
    sizes = view.sizes()
    return Bits(
        quantized_linears=8 * sizes.linear_bytes / sizes.linear_parameters if sizes.linear_parameters else None,
        all_parameters=8 * sizes.tensor_bytes / sizes.parameters,
        files=8 * sizes.file_bytes / sizes.parameters,
    )
