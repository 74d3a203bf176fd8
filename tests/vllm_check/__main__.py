"""Check a repository against its BF16 copy in vLLM; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
KL_LIMIT = 1e-3
LOG_LINES = 60

Report = dict[str, Any]


def main() -> None:
    """Exit with 0 when all is as it should be, with 1 when not; the report says what was seen."""
    arguments = _arguments()
    images = [str(image.resolve()) for image in arguments.images]
    with tempfile.TemporaryDirectory() as directory:
        served = Path(directory) / "repository"
        copy = Path(directory) / "reference"
        options = [*(["--draft"] if arguments.draft else []), "--images", *images]
        report = _serve(arguments.repository, served, ["--reference", str(arguments.reference.resolve()), *options])
        if "failed" in report:
            report["problems"] = ["vLLM does not serve the repository"]
        else:
            # Drafting changes how vLLM computes, if only in the last bit, so the copy drafts as well.
            report |= _verdict(report, _serve(arguments.reference, copy, options), served, copy)
    arguments.json.write_text(json.dumps(report, indent=1))
    sys.stdout.write("".join(f"{line}\n" for line in _summary(report)))
    raise SystemExit(bool(report["problems"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.vllm_check", description=__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--reference", type=Path, required=True, help="plain BF16 copy with the dequantized weights")
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="shown in one prompt")
    parser.add_argument("--draft", action="store_true", help="speculate with the repository's own draft layer")
    parser.add_argument("--json", type=Path, required=True, help="where the report goes")
    return parser.parse_args()


def _serve(directory: Path, output: Path, options: list[str]) -> Report:
    """The report of an engine; with `failed`, the end of its log, if it did not get through."""
    output.mkdir()
    command = [sys.executable, "-m", "tests.vllm_check.serve", str(directory.resolve()), "--output", str(output)]
    run = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if run.returncode:
        return {"failed": run.stdout.splitlines()[-LOG_LINES:]}
    return json.loads((output / "report.json").read_text())


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
