"""Assembling a plan's repository: write, verify, then publish at its place; and verifying an existing one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from jobs.pipeline import checks
from jobs.pipeline.measured import Measured
from jobs.pipeline.run import Run
from prismaquant_ray import __version__
from prismaquant_ray.config import Config
from prismaquant_ray.errors import InputError, PrismaquantError
from prismaquant_ray.events import Listener, RepositoryWritten
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.parsing import MAX_BYTES, MalformedError
from prismaquant_ray.records import PlanRecord, PlanSummary
from prismaquant_ray.report.card import card
from prismaquant_ray.report.shipped import gather_shipped
from prismaquant_ray.repository.manifest import MANIFEST, read_manifest
from prismaquant_ray.repository.quantization_config import check_choice
from prismaquant_ray.repository.staging import check_output, staged_output
from prismaquant_ray.repository.verify import verify_repository
from prismaquant_ray.repository.writer import NO_CACHE, Written, WrittenRepository, write_repository
from prismaquant_ray.source.files import INDEX
from prismaquant_ray.storage.connection import absolute
from prismaquant_ray.storage.prefix import Prefix, get_json
from prismaquant_ray.storage.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class AssembledRepository:
    """A verified repository: bytes of every file, SHA-256 of every shard, and its plan.

    `named_by` is the server whose own names and fused Linears are known, None where they are assumed.
    """

    repository: str
    total_bytes: int
    bpp: float
    bits_all_parameters: float
    files: dict[str, int]
    sha256: dict[str, str]
    plan: PlanSummary
    named_by: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedRepository:
    """Result of `verify`: problems, Linears by format, tensors, bytes; the exit code is 2 if there are problems."""

    repository: str
    ok: bool
    named_by: str | None
    problems: list[str]
    linears: dict[FormatName, int]
    tensors: int
    total_bytes: int
    bpp: float
    exit_code: int


def assemble(run: Run, measured: Measured, plan: PlanRecord, output: Path | str | None = None) -> AssembledRepository:
    """Write and verify a plan's repository. It appears at `output` (default `store.output`) only if it is correct."""
    started = time.monotonic()
    output = run.config.store.output if output is None else output
    check_output(output)
    layout, candidates = measured.layout, measured.candidates
    used = {(layout.block_of[group].index, name) for group, name in plan.choice.items() if FORMATS[name].codec}
    # Checked before writing, so that a damaged store is not reported as a bug of the writer.
    candidates.check(sorted(used))
    findings, known = measured.findings(plan), measured.measured_plans()
    manifest = {
        "prismaquant_ray": __version__,
        "target": plan.target,
        "objective": plan.objective,
        "predicted_loss": plan.predicted_loss,
        "bpp": plan.bpp,
    }

    def readme(written: Written) -> bytes:
        return card(findings, gather_shipped(measured.data, plan, written, known)).encode()

    source = measured.shipped(plan.choice)
    cache = measured.cache_scales(plan.choice) if plan.kv_cache == "fp8" else NO_CACHE
    run.say(f"writing the repository to {output}")
    with staged_output(output) as store:
        repository = write_repository(
            source, layout, plan.choice, candidates, store, cache=cache, manifest=manifest, card=readme
        )
        run.say(f"verifying {output}")
        verification = verify_repository(store, source, layout, plan.choice, candidates, cache=cache)
        if not verification.ok:
            raise PrismaquantError(
                f"the repository is wrong ({verification.problems[0]}); this is a bug, nothing was published"
            )
        _check_budget(measured, plan, store, repository)
    run.note(
        RepositoryWritten(
            uri=absolute(output),
            target=plan.target,
            bpp=repository.bpp,
            bytes=repository.total_bytes,
            seconds=round(time.monotonic() - started, 3),
        )
    )
    return AssembledRepository(
        repository=str(output),
        total_bytes=repository.total_bytes,
        bpp=repository.bpp,
        bits_all_parameters=repository.bits_all_parameters,
        files=repository.files,
        sha256=repository.sha256,
        plan=plan.summary,
        named_by=measured.layout.named_by,
    )


def _check_budget(measured: Measured, plan: PlanRecord, store: Prefix, repository: WrittenRepository) -> None:
    """Check the budget against the written bytes, those of weights, or the tensors as a server loads them."""
    budget, serving = measured.config.budget, measured.planner.sizes_with(plan.kv_cache).serving
    if plan.target != budget.target:
        return  # made for another budget, checked when it was planned
    exceeded = budget.bytes is not None and repository.total_bytes > budget.bytes
    if budget.bpp is not None:
        parameters = measured.layout.parameters
        exceeded = round(repository.bpp * parameters / 8) > int(budget.bpp * parameters / 8)
    if budget.vram is not None:
        assert serving is not None
        loaded = get_json(store, INDEX)["metadata"]["total_size"]
        exceeded = serving.needed(loaded) > budget.vram
    if exceeded:
        raise PrismaquantError(
            f"{repository.total_bytes} bytes and {repository.bpp:.4f} bits per parameter exceed the budget "
            f"{budget.target}; this is a bug, nothing was published"
        )


def verify(config: Config, *, on_event: Listener | None = None) -> VerifiedRepository:
    """Check the repository at `store.output`, for any budget, against the run and the source.

    Checks names, routing, bytes and sizes as a runtime sees them.

    Raises:
        InputError: there is no complete quantized repository of ours.
    """
    output = config.store.output
    if not checks.exists(output, MANIFEST):
        raise InputError(f"store.output {output} is not a repository of ours; run assemble first")
    store = Store(output, create=False)
    try:
        manifest = read_manifest(store.get(MANIFEST, MAX_BYTES))
    except MalformedError as error:
        raise InputError(f"store.output {output}: {MANIFEST} {error}; run assemble again") from error
    if manifest.dequantized:
        raise InputError(f"store.output {output} is a dequantized repository; verify the quantized one")
    if manifest.choice is None:
        raise InputError(f"store.output {output} was not written to its end; run assemble again")
    unknown = next((name for name in manifest.choice.values() if name not in FORMATS), None)
    if unknown is not None:
        raise InputError(f"store.output {output}: {MANIFEST} names a format {unknown!r}; run assemble again")
    choice = {group: FormatName(name) for group, name in manifest.choice.items()}
    measured = Run(config, on_event=on_event).measured()
    try:
        check_choice(measured.layout, choice)
    except InputError as error:
        raise InputError(f"store.output {output}: {MANIFEST}: {error}") from error
    cache = NO_CACHE if manifest.kv_cache is None else measured.cache_scales(choice)
    source, layout = measured.shipped(choice), measured.layout
    found = verify_repository(store, source, layout, choice, measured.candidates, cache=cache)
    return VerifiedRepository(
        repository=str(output),
        ok=found.ok,
        named_by=measured.layout.named_by,
        problems=list(found.problems),
        linears=dict(found.linears),
        tensors=found.tensors,
        total_bytes=found.total_bytes,
        bpp=found.bpp,
        exit_code=0 if found.ok else 2,
    )
