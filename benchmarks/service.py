"""What is around the passes: `python -m benchmarks.service` (about six minutes on two cores).

Commands as a user starts them, on the demo model: `--help`; a plan and a repository for another budget from stored
candidates; `verify`; and a job of a tiny model, from its start to the first unit of work. Then throughput, in one
process, on a model of random weights: assembling (candidates checked, repository written) and verifying, against
copying the bytes that ship: read from the source and the candidates and written once, through one buffer, with warm
caches and, like the writer, without fsync. Beside it what one core needs for the SHA-256 of these bytes, of which an
assembly takes two (candidates as they are read, files as they are written) and a verification one. Everything is
interleaved and repeated; figures are medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import demo
from benchmarks.results import log_of, save
from benchmarks.usage import Usage, measured
from prismaquant_ray import FORMATS, FormatName, __version__
from prismaquant_ray.event_log import steps_by_shard
from prismaquant_ray.events import Event, RunBegan, WorkerReady
from prismaquant_ray.forward.candidates import Candidates
from prismaquant_ray.forward.scale_search import nearest
from prismaquant_ray.layout import Layout
from prismaquant_ray.model.layout_builder import build_layout
from prismaquant_ray.repository.verify import verify_repository
from prismaquant_ray.repository.writer import write_repository
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.record import Artifact, write_tensors
from prismaquant_ray.storage.store import Store

# Candidates have their full size however few tokens they were measured on.
SMALL = ("calibration.sequences=4", "calibration.length=64", "evaluation.sequences=2", "evaluation.length=32")
BPP = 5.123
FORMATS_USED = (FormatName.NVFP4, FormatName.MXFP8, FormatName.BF16)
# Source and candidates of the random model are about 1.2 GB each.
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 2048, 8192, 9, 32_000
_BUFFER = 1 << 24


def medians(uses: Sequence[Usage]) -> dict[str, float]:
    """Of each figure by itself."""
    return {
        "wall": round(statistics.median(use.wall for use in uses), 3),
        "cpu": round(statistics.median(use.cpu for use in uses), 3),
        "peak_mb": round(statistics.median(use.peak for use in uses) / 1e6, 1),
    }


# Commands -----------------------------------------------------------------------------------------------------------


def commands(work: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Short commands on the demo model, from candidates that are made first where they are not there."""
    stored = work / f"run-{__version__}"  # another version refuses it
    settings = [*SMALL, f"store.run={stored}"]
    if not (stored / "measured.json").exists():
        measured(demo.command("probe", settings=settings), log=work / "probe.log")
    settings += [f"budget.bpp={BPP}", f"store.output={work / 'other'}"]
    called: dict[str, list[str]] = {
        "help": [str(demo.COMMAND), "--help"],
        **{name: demo.command(name, settings=settings) for name in ("allocate", "assemble", "verify")},
    }
    for command in called.values():
        measured(command, log=work / "log")  # fills caches
    uses: dict[str, list[Usage]] = {name: [] for name in called}
    for _ in range(repeats):
        for name, command in called.items():
            uses[name].append(measured(command, log=work / "log"))
    return {name: medians(found) for name, found in uses.items()}


def starts(work: Path, repeats: int) -> dict[str, float]:
    """Seconds from the start of `quantize` to what its log says, for a tiny checkpoint and a Ray of its own."""
    from tests.tiny import make_checkpoint, make_text

    tiny = work / "tiny"
    shutil.rmtree(tiny, ignore_errors=True)
    make_checkpoint(tiny / "source", "llama")
    text = make_text(tiny, 20_000)
    found: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        body = {
            "model": {"source": str(tiny / "source")},
            "calibration": {"text": str(text), "sequences": 4, "length": 32, "microbatch": 2},
            "formats": [str(name) for name in FORMATS_USED],
            "budget": {"bpp": 6.0},
            "cluster": {"address": "local", "workers": 2, "threads": 1},
            "store": {"run": str(tiny / f"run-{repeat}"), "output": str(tiny / "out")},
        }
        (tiny / "config.yaml").write_text(json.dumps(body))  # JSON is YAML
        began = time.time()
        used = measured(demo.command("quantize", tiny / "config.yaml"), log=tiny / "log")
        events = log_of(tiny / f"run-{repeat}")
        seconds = {
            "begin": first_of(events, RunBegan) - began,
            "worker": first_of(events, WorkerReady) - began,
            "first_unit": min(work.started for work in steps_by_shard(events)) - began,
        }
        if repeat:  # the first one fills caches
            for kind, value in [*seconds.items(), ("whole_command", used.wall), ("cpu", used.cpu)]:
                found.setdefault(kind, []).append(value)
    return {kind: round(statistics.median(values), 2) for kind, values in found.items()}


def first_of(events: Sequence[Event], kind: type[Event]) -> float:
    """When the first event of a kind happened, in seconds since the epoch."""
    return next(event.at for event in events if isinstance(event, kind))


# Throughput ---------------------------------------------------------------------------------------------------------


def make_model(directory: Path) -> None:
    """A checkpoint of random weights and its candidates, rounded to nearest."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    source = directory / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 4, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    names = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    names |= {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    weights = {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in names.items()}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    store = Store(directory / "run")
    artifacts = []
    for block in build_layout(Checkpoint(Store(source)))[1].blocks:
        for name in FORMATS_USED:
            codec = FORMATS[name].codec
            if codec is None:
                continue
            tensors: dict[str, Tensor] = {}
            for linear in (linear for group in block.groups for linear in group.linears):
                packed = codec.pack(nearest(weights[linear.sources[0]].float(), codec, codec.global_scale(8.0)))
                if FORMATS[name].static_input_scale:
                    packed["input_global_scale"] = torch.tensor([96.0])
                tensors |= {f"{linear.name}.{suffix}": tensor for suffix, tensor in packed.items()}
            artifact = write_tensors(store, f"forward/{block.key}/{name}.safetensors", tensors)
            artifacts.append([block.index, str(name), artifact.key, artifact.size, artifact.sha256])
    (directory / "artifacts.json").write_text(json.dumps(artifacts))


def shipped_ranges(source: Checkpoint, layout: Layout, choice: Mapping[str, FormatName], stored: Candidates) -> Ranges:
    """Where the bytes are that ship: file, first and last; neighbours together."""
    assert source.store.path is not None
    assert stored.store.path is not None
    replaced = set()
    found = []
    for block in layout.blocks:
        for group in block.groups:
            if FORMATS[choice[group.name]].codec is None:
                continue
            file = stored.file(block.index, choice[group.name])
            for linear in group.linears:
                replaced |= set(linear.sources)
                for infos in file.of(choice[group.name], linear).values():
                    found += [(stored.store.path / info.file, info.start, info.stop) for info in infos]
    found += [
        (source.store.path / info.file, info.start, info.stop)
        for name, info in source.tensors.items()
        if name not in replaced
    ]
    joined: Ranges = []
    for path, start, stop in sorted(found):
        if joined and joined[-1][0] == path and joined[-1][2] == start:
            joined[-1] = (path, joined[-1][1], stop)
        else:
            joined.append((path, start, stop))
    return joined


Ranges = list[tuple[Path, int, int]]


def copy(ranges: Ranges, target: Path) -> None:
    """Read ranges and write them to one file, through one buffer."""
    buffer = memoryview(bytearray(_BUFFER))
    with target.open("wb", buffering=0) as output:
        for path, start, stop in ranges:
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                while (left := stop - file.tell()) > 0:
                    count = file.readinto(buffer[: min(_BUFFER, left)])
                    output.write(buffer[:count])


def digest(ranges: Ranges) -> None:
    """Read ranges and take their SHA-256, in one thread."""
    buffer = memoryview(bytearray(_BUFFER))
    sha256 = hashlib.sha256()
    for path, start, stop in ranges:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while (left := stop - file.tell()) > 0:
                sha256.update(buffer[: file.readinto(buffer[: min(_BUFFER, left)])])


def throughput(work: Path, repeats: int) -> dict[str, Any]:
    """GB of shipped bytes a second: copied, digested, assembled, verified; and what share of copying that is."""
    directory = work / "random"
    if not (directory / "artifacts.json").exists():
        shutil.rmtree(directory, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "benchmarks.service", "--make", directory], check=True)
    source = Checkpoint(Store(directory / "source", create=False))
    layout = build_layout(source)[1]
    entries = json.loads((directory / "artifacts.json").read_text())
    artifacts = {(i, FormatName(name)): Artifact(key=key, size=size, sha256=sha) for i, name, key, size, sha in entries}
    # A third of the groups in each format.
    choice = {group.name: FORMATS_USED[index % 3] for index, group in enumerate(layout.groups)}
    used = sorted((layout.block_of[g].index, name) for g, name in choice.items() if FORMATS[name].codec)
    output = work / "repository"
    ranges = shipped_ranges(source, layout, choice, Candidates(Store(directory / "run"), artifacts))
    shipped = sum(stop - start for _, start, stop in ranges)

    def candidates() -> Candidates:
        return Candidates(Store(directory / "run", create=False), artifacts)

    def assemble() -> None:
        stored = candidates()
        stored.check(used)
        write_repository(source, layout, choice, stored, Store(output), manifest={})

    def verify() -> None:
        report = verify_repository(Store(output, create=False), source, layout, choice, candidates())
        assert report.ok, report.problems

    actions: dict[str, Callable[[], None]] = {
        "copy": lambda: copy(ranges, work / "copy"),
        "digest": lambda: digest(ranges),
        "assemble": assemble,
        "verify": verify,
    }
    uses: dict[str, list[Usage]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        (work / "copy").unlink(missing_ok=True)
        shutil.rmtree(output, ignore_errors=True)
        for name, action in actions.items():
            os.sync()  # what the one before left to be written
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if repeat:  # the first one fills caches
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                uses[name].append(Usage(wall=wall, cpu=cpu, peak=peak))
    rows: dict[str, Any] = {"shipped_gb": round(shipped / 1e9, 3)}
    for name, found in uses.items():
        shares = [own.wall / use.wall for own, use in zip(uses["copy"], found, strict=True)]
        rate = shipped / 1e9 / statistics.median(use.wall for use in found)
        rows[name] = medians(found) | {"gb_per_s": round(rate, 3), "of_copying": round(statistics.median(shares), 2)}
    return rows


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """The figures for people."""
    for name, row in figures["commands"].items():
        yield f"{name:<10}{row['wall']:>8.2f} s{row['cpu']:>8.2f} s CPU{row['peak_mb']:>8.0f} MB"
    start = figures["start"]
    yield f"start     {start['first_unit']:>8.2f} s to the first unit of work, {start['worker']:.2f} s to a worker"
    for name in ("copy", "digest", "assemble", "verify"):
        row = figures["throughput"][name]
        yield f"{name:<10}{row['gb_per_s']:>8.2f} GB/s{row['cpu']:>8.2f} s CPU, {row['of_copying']:.0%} of copying"


def main() -> None:
    """Measure everything, or make the random model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/service"), help="Where models and stores are kept.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make is not None:
        make_model(arguments.make)
        return
    demo.need()
    arguments.work.mkdir(parents=True, exist_ok=True)
    figures = {
        "throughput": throughput(arguments.work, arguments.repeats),
        "commands": commands(arguments.work, arguments.repeats),
        "start": starts(arguments.work, arguments.repeats),
        "repeats": arguments.repeats,
        "load_average": os.getloadavg(),
    }
    print("\n".join(lines(figures)))
    save("service", figures)


if __name__ == "__main__":
    main()
