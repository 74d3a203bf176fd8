"""Whole jobs beside those of other tools, from a model to a repository: time, CPU, memory, bytes, and quality.

    .venv/bin/python -m benchmarks.whole_job [--repeats N] [--only NAME,…] [--add] [--quality]

Every job runs in processes of its own on the same model, tokens and number of threads; what is compared, and what that
does not say, is in peers/README.md. A job's figures in results/whole_job.json are replaced when it runs again, and
added to with --add; the others stay. --quality measures the repositories that the last runs left in runs/whole_job/,
and with --repeats 0 does nothing else. Needs the demo's source.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks import demo, results
from benchmarks.usage import Usage, measured
from prismaquant_ray import BudgetConfig, InputError, evaluate, load_config, open_run
from prismaquant_ray.calibration.text import load_sequences

PEERS, ENVIRONMENTS, RUNS = Path("benchmarks/peers"), Path(".venv-peers"), Path("runs/whole_job")
THREADS = 2
REFERENCE = "llm-compressor-gptq"
UNITS = {"wall": ("s", 1.0), "cpu": ("s", 1.0), "peak": ("GB", 1e9)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A tool: its main package, the others to install, and the script that runs it."""

    package: str
    others: tuple[str, ...]
    script: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """`arguments` are of a peer's script, or settings of ours."""

    peer: str | None = None
    arguments: tuple[str, ...]
    settings: str


LLM_COMPRESSOR, AUTO_ROUND, MODELOPT = "llm-compressor", "auto-round", "modelopt"
TOOLS = {
    LLM_COMPRESSOR: Peer(package="llmcompressor", others=("datasets",), script="llm_compressor.py"),
    AUTO_ROUND: Peer(package="auto-round", others=("compressed-tensors",), script="auto_round_scheme.py"),
    MODELOPT: Peer(
        package="nvidia-modelopt",
        others=("accelerate", "requests", "transformers"),
        script="model_optimizer.py",
    ),
}
_OURS = (
    "quantize with NVFP4, MXFP8 and BF16, scale search and GPTQ, every candidate priced, a sweep of eight budgets, the "
    "plan of 5.5 bits assembled and verified; two workers of one thread; no evaluation; computes in"
)
JOBS = {
    "ours-float32": Job(arguments=("model.dtype=float32",), settings=f"{_OURS} float32, the default on CPUs"),
    "ours-bfloat16": Job(arguments=("model.dtype=bfloat16",), settings=f"{_OURS} bfloat16, the model's own"),
    REFERENCE: Job(
        peer=LLM_COMPRESSOR,
        arguments=("--modifier", "gptq"),
        settings="GPTQModifier, scheme NVFP4, all defaults; computes in bfloat16",
    ),
    "llm-compressor-rtn": Job(
        peer=LLM_COMPRESSOR,
        arguments=("--modifier", "rtn"),
        settings="QuantizationModifier, scheme NVFP4, all defaults; computes in bfloat16",
    ),
    "auto-round": Job(
        peer=AUTO_ROUND,
        arguments=("--bits", "5.5"),
        settings="AutoScheme of NVFP4 and MXFP8 at 5.5 bits, its own 16 × 256 tokens for the scores; iters=0, which is "
        "its optimised rounding to nearest; computes in bfloat16",
    ),
    "modelopt": Job(
        peer=MODELOPT,
        arguments=("--bits", "5.5"),
        settings="auto_quantize of NVFP4 and MXFP8 at 5.5 effective bits without the output head, gradient score; "
        "computes in bfloat16",
    ),
}


def interpreter(name: str) -> Path:
    """The Python of a peer's virtual environment, which is made where it is missing."""
    directory, peer = ENVIRONMENTS / name, TOOLS[name]
    python, mark = directory / "bin" / "python", directory / "installed"
    if not mark.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
        constraints = ["--constraint", str(PEERS / f"constraints-{name}.txt")]
        subprocess.run([*pip, *constraints, "torch", peer.package, *peer.others], check=True)
        mark.touch()
    return python


def version(name: str) -> str:
    """The installed version of a peer."""
    code = f"import importlib.metadata as m; print(m.version({TOOLS[name].package!r}))"
    done = subprocess.run([interpreter(name), "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return f"{TOOLS[name].package} {done.stdout.strip()}"


def exported(place: Path) -> Path:
    """The demo's calibration tokens, (sequences, length) int64, as a file."""
    calibration = load_config(demo.CONFIG).calibration
    found = load_sequences(
        Path(calibration.text[0].path),
        AutoTokenizer.from_pretrained(demo.MODEL),
        sequences=calibration.sequences,
        length=calibration.length,
        seed=calibration.seed,
        holdout=calibration.holdout,
    )
    np.save(place, found.tokens.numpy())
    return place


def commands(job: Job, place: Path, tokens: Path) -> list[list[str | Path]]:
    """What has to be run, one after another."""
    repository = place / "repository"
    if job.peer is not None:
        script = PEERS / TOOLS[job.peer].script
        options = (*job.arguments, "--threads", str(THREADS))
        return [[interpreter(job.peer), script, demo.MODEL, tokens, repository, *options]]
    return [[*demo.command("quantize", settings=ours(job, place, repository))]]


def ours(job: Job, place: Path, repository: Path) -> list[str]:
    """The settings of our own job: the demo's, but nothing is evaluated."""
    return [
        "evaluation=null",
        "cluster.address=local",
        f"cluster.workers={THREADS}",
        "cluster.threads=1",
        f"store.run={place / 'run'}",
        f"store.output={repository}",
        *job.arguments,
    ]


def environment(place: Path) -> dict[str, str]:
    """Nothing of an earlier run is found in a cache, and nothing is looked for on a hub."""
    threads = {key: str(THREADS) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**threads, "HOME": str(place.resolve()), "AR_WORK_SPACE": str(place / "work"), "HF_HUB_OFFLINE": "1"}


def run(name: str, tokens: Path) -> dict[str, Any]:
    """One run of a job, from nothing; of a peer that cannot do it, the error."""
    job, place = JOBS[name], RUNS / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    facts: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="minutes"), "load": os.getloadavg()[0]}
    used = []
    try:
        for number, command in enumerate(commands(job, place, tokens)):
            used.append(measured(command, log=place / f"log{number}", env=environment(place)))
    except subprocess.CalledProcessError as error:
        if job.peer is None:
            raise
        return {**facts, "error": error.output.strip().splitlines()[-1]}
    whole = Usage(wall=sum(u.wall for u in used), cpu=sum(u.cpu for u in used), peak=max(u.peak for u in used))
    size = sum(path.stat().st_size for path in repository_of(name).rglob("*") if path.is_file())
    return {**facts, **{key: getattr(whole, key) for key in UNITS}, "bytes": size}


def repository_of(name: str) -> Path:
    """Where a job's last run left its repository; some tools write it into a directory below the one they are given."""
    return next(path.parent for path in (RUNS / name / "repository").rglob("config.json"))


def quality(name: str) -> dict[str, Any]:
    """KL against the source of what the last run left, in nats per token; our own also at 4.5 bits."""
    job = JOBS[name]
    repositories = {"repository": repository_of(name)}
    if job.peer is None:
        other = RUNS / name / "repository-4.5bpp"
        shutil.rmtree(other, ignore_errors=True)
        run = open_run(load_config(demo.CONFIG, ours(job, RUNS / name, repositories["repository"])))
        run.assemble(run.plan(BudgetConfig(bpp=4.5)), other)
        repositories = {"5.5 bits": repositories["repository"], "4.5 bits": other}
    return {key: evaluated(repository) for key, repository in repositories.items()}


def evaluated(repository: Path) -> dict[str, Any]:
    """KL of a repository and what it weighs, or why it cannot be read."""
    workers = f"cluster.workers={THREADS}"
    try:
        found = evaluate(str(repository), str(demo.MODEL), demo.EVALUATION_TEXT, overrides=[workers])
    except InputError as error:
        return {"refused": str(error)}
    return {
        "formats": found.formats,
        "bits": asdict(found.bits),
        "kl_weights": found.weights.kl_mean,
        "kl": found.activations.kl_mean,
        "kl_standard_error": found.activations.kl_standard_error,
        "top1": found.activations.top1_agreement,
        "notes": found.notes,
    }


def stored() -> dict[str, Any]:
    """The jobs that were measured before; SystemExit when that was on another machine."""
    path = results.RESULTS / "whole_job.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["machine"] != results.machine():
        raise SystemExit(f"{path} is of another machine ({found['machine']}); move it away")
    jobs: dict[str, Any] = found["jobs"]
    return jobs


def save(jobs: dict[str, Any]) -> None:
    """Store everything, with medians and their ratios to the reference."""
    for entry in jobs.values():
        whole = [each for each in entry["runs"] if "error" not in each]
        entry["median"] = {key: median(each[key] for each in whole) for key in (*UNITS, "bytes")} if whole else None
    reference = jobs.get(REFERENCE, {}).get("median")
    for entry in jobs.values():
        comparable = entry["median"] is not None and reference is not None
        entry["ratio"] = {key: entry["median"][key] / reference[key] for key in UNITS} if comparable else None
    results.save("whole_job", {"reference": REFERENCE, "threads": THREADS, "jobs": jobs})


def table(jobs: dict[str, Any]) -> str:
    """Medians, ratios in brackets, and quality below."""
    lines = [f"{'':20}{'runs':>5}{'wall':>17}{'CPU':>17}{'peak':>18}{'repository':>12}"]
    for name in (name for name in JOBS if name in jobs):
        entry = jobs[name]
        if entry["median"] is None:
            lines.append(f"{name:20}{len(entry['runs']):5}  {entry['runs'][-1]['error']}")
            continue
        cells = []
        for key, (unit, size) in UNITS.items():
            ratio = "" if entry["ratio"] is None else f" ({entry['ratio'][key]:.2f})"
            digits = 2 if unit == "GB" else 0
            cells.append(f"{entry['median'][key] / size:.{digits}f} {unit}{ratio}")
        written = f"{entry['median']['bytes'] / 1e6:.1f} MB"
        lines.append(f"{name:20}{len(entry['runs']):5}{cells[0]:>17}{cells[1]:>17}{cells[2]:>18}{written:>12}")
    for name, entry in jobs.items():
        for key, found in entry.get("quality", {}).items():
            lines.append(f"{name}, {key}: {_quality(found)}")
    return "\n".join(lines)


def _quality(found: dict[str, Any]) -> str:
    if "refused" in found:
        return str(found["refused"])
    bits = found["bits"]["quantized_linears"]
    quantized = "nothing quantized" if bits is None else f"{bits:.4f} bits of quantized Linears"
    return (
        f"KL {found['kl']:.5f} ± {found['kl_standard_error']:.5f}, weights only {found['kl_weights']:.5f}; "
        f"{quantized}, {found['bits']['all_parameters']:.3f} of all parameters; {found['formats']}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=",".join(JOBS), metavar="NAME,…")
    parser.add_argument("--add", action="store_true", help="keep the runs that are stored of these jobs")
    parser.add_argument("--quality", action="store_true", help="evaluate the repositories, too")
    asked = parser.parse_args(arguments)
    names = asked.only.split(",")
    if unknown := set(names) - set(JOBS):
        parser.error(f"no job is called {', '.join(sorted(unknown))}; there are {', '.join(JOBS)}")
    demo.need()
    RUNS.mkdir(parents=True, exist_ok=True)
    tokens = exported(RUNS / "tokens.npy")
    # Installed before anything is measured.
    versions = {peer: version(peer) for peer in dict.fromkeys(JOBS[name].peer for name in names) if peer is not None}
    jobs = stored()
    for repeat in range(asked.repeats):
        for name in names:
            job = JOBS[name]
            found = run(name, tokens)
            earlier = jobs[name]["runs"] if name in jobs and (asked.add or repeat) else []
            tool = versions[job.peer] if job.peer is not None else "this project"
            jobs[name] = {"tool": tool, "settings": job.settings, "runs": [*earlier, found]}
            save(jobs)
    if asked.quality:
        for name in names:
            if jobs[name]["median"] is not None:
                jobs[name]["quality"] = quality(name)
                save(jobs)
    print(table(jobs))


if __name__ == "__main__":
    main()
