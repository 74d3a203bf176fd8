"""The report of a run: one HTML page, its JSON and its plots."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from jobs.pipeline.run import Run
from prismaquant_ray import records
from prismaquant_ray.report.findings import Findings
from prismaquant_ray.serialization import to_bytes
from prismaquant_ray.storage.connection import local_path
from prismaquant_ray.storage.store import Store, check_directory


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenReport:
    """The page, all files of the report, and whether it has measured losses."""

    report: str
    files: list[str]
    measured: bool


def report(run: Run, *, out: str | None = None) -> WrittenReport:
    """Measure what is missing, then write the report below `report/` of the run store, or into `out`."""
    if out is not None:
        path = local_path(out)
        Store(out, create=False).check_writable() if path is None else check_directory(path)
    findings = run.repairing(lambda known: known.findings(known.plan))
    store, prefix = (run.store, records.REPORT) if out is None else (Store(out), "")
    written = write_report(findings, store, prefix)
    uri = store.uri.rstrip("/")
    return WrittenReport(
        report=f"{uri}/{prefix}report.html",
        files=[f"{uri}/{key}" for key in written],
        measured=findings.measured is not None,
    )


def write_report(findings: Findings, store: Store, prefix: str) -> list[str]:
    """Render everything, then write it, the page last, so that its links are valid.

    Without matplotlib (the extra `plots`) there are no PNGs.
    """
    # Not at the top: other commands do not need jinja2.
    from prismaquant_ray.report.page import page

    objects = {f"{name}.png": data for name, data in _plots(findings).items()}
    objects |= {"report.json": to_bytes(findings), "report.html": page(findings).encode()}
    for name, data in objects.items():
        store.put(f"{prefix}{name}", data)
    return [f"{prefix}{name}" for name in reversed(objects)]


def _plots(findings: Findings) -> dict[str, bytes]:
    if find_spec("matplotlib") is None:
        return {}
    from prismaquant_ray.report.plots import plots

    return plots(findings)
