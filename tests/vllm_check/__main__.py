"""Check a repository against its BF16 copy in vLLM; see the package's docstring."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from tests.vllm_check.serve import LINES, Task

ROOT = Path(__file__).parents[2]
KL_LIMIT = 1e-3

Report = dict[str, Any]


class Job(NamedTuple):
    """A repository, its BF16 copy, and where the report goes; images to show, whether to draft."""

    repository: str
    reference: str
    report: str
    images: Sequence[str] = ()
    draft: bool = False


def main() -> None:
    """Check every job of a JSON list on standard input; a report says what was seen, with `problems` if any."""
    jobs = [Job(*fields) for fields in json.load(sys.stdin)]
    with tempfile.TemporaryDirectory() as directory:
        outputs = [(f"{directory}/{index}-repository", f"{directory}/{index}-copy") for index in range(len(jobs))]
        log = _serve(
            [
                Task(source, output, reference, job.images, job.draft)
                for job, (served, copy) in zip(jobs, outputs, strict=True)
                # Drafting changes how vLLM computes, if only in the last bit, so the copy drafts as well.
                for source, output, reference in ((job.repository, served, job.reference), (job.reference, copy, None))
            ]
        )
        for job, (served, copy) in zip(jobs, outputs, strict=True):
            report = _report(served, log)
            if "failed" in report:
                report["problems"] = ["vLLM does not serve the repository"]
            else:
                report |= _verdict(report, _report(copy, log), Path(served), Path(copy))
            report["repository"] = job.repository
            Path(job.report).write_text(json.dumps(report, indent=1))
            sys.stdout.write("".join(f"{line}\n" for line in [job.repository, *_summary(report)]))


def _serve(tasks: list[Task]) -> list[str]:
    """The end of the log of an engine that has served them all."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.vllm_check.serve"],
        input=json.dumps(tasks),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return run.stdout.splitlines()[-LINES:]


def _report(output: str, log: list[str]) -> Report:
    """The report of a task; with `failed`, why there is none or what its engine ended with."""
    path = Path(output) / "report.json"
    return json.loads(path.read_text()) if path.is_file() else {"failed": log}


def _verdict(report: Report, reference: Report, served: Path, copy: Path) -> Report:
    if "failed" in reference:
        return {"problems": ["vLLM does not serve the reference"], "reference_failed": reference["failed"]}
    found, expected = (load_file(path / "logits.safetensors") for path in (served, copy))
    divergence = {kind: _divergence(expected[kind], found[kind]) for kind in found}
    problems = [
        f"{layer['name']} ({layer['format']}): {layer['different']} weights are not the reference's"
        for layer in report["layers"] + report.get("draft_layers", [])
        if layer["different"]
    ]
    problems += [
        f"{kind}: mean KL {values['mean']:.6f}, {values['max']:.6f} at most"
        for kind, values in divergence.items()
        if kind != "rounded" and not values["max"] <= KL_LIMIT
    ]
    if "draft" in report:
        if not report["draft"]["proposed"]:
            problems.append("no token was drafted")
        if report["draft"] != reference["draft"]:
            problems.append("the copy generates other tokens, or drafts them otherwise")
    return {"divergence": divergence, "reference_seconds": reference["seconds"], "problems": problems}


def _divergence(expected: Tensor, found: Tensor) -> dict[str, float]:
    """KL(expected ‖ found) over positions, in nats."""
    if expected.shape != found.shape:
        return {"mean": float("inf"), "max": float("inf"), "top1": 0.0, "positions": len(found)}
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    same = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return {"mean": float(kl.mean()), "max": float(kl.max()), "top1": float(same), "positions": len(kl)}


def _summary(report: Report) -> list[str]:
    if "failed" in report:
        return [*report["failed"], *report["problems"]]
    layers = report["layers"] + report.get("draft_layers", [])
    counts = {name: sum(layer["format"] == name for layer in layers) for name in sorted({x["format"] for x in layers})}
    compared = [layer for layer in layers if layer["different"] is not None]
    lines = [
        "layers: " + ", ".join(f"{count} {name}" for name, count in counts.items()),
        f"quantized layers compared: {len(compared)}, exact: {sum(not layer['different'] for layer in compared)}",
    ]
    for kind, values in report.get("divergence", {}).items():
        lines.append(f"KL {kind}: mean {values['mean']:.6f}, max {values['max']:.6f}, {values['positions']} positions")
    if "draft" in report:
        lines.append(f"drafted: {report['draft']['proposed']}, accepted: {report['draft']['accepted']}")
    return [*lines, *report.get("reference_failed", []), *report["problems"]]


if __name__ == "__main__":
    main()
