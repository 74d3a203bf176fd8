"""One GPU, alone: is its arithmetic the CPU's, and how far is a worker's path from what the card can do?

    python -m benchmarks.gpu [--budget 480] [--output gpu.json]

Needs torch with CUDA, triton and transformers, and a copy of this repository; no Ray, no storage, no model. Weights are
random, of the shapes of a layer of Qwen3-8B and of a layer of 256 experts as in Qwen3.6-35B-A3B (with full attention).
The steps, in this order, each of which is written down as soon as it is done:

- `card`: hardware and software; `checks`: what `doctor` checks, in every format; `bits`: scale search and GPTQ of
  larger matrices on the card and on the CPU; `rates`: products, memory, copies, a launch, by which the rest is judged;
- `dense`, `experts`: loading, forward, Hessians, encoding, decoding, backward with prices; `exit`: head and loss.
  Milliseconds are medians between two events on the card. `bound` is the larger of arithmetic and traffic at the card's
  own rates, and `share` is the bound over the time: 1 is the roofline. `waits` are those that torch sees in a step;
- `again`: encoding and gradients once more, of the same inputs: how many bits differ.

A step that fails is written down with its error, the others are measured all the same, and the exit code is 1. Without
a GPU, `--device cpu --small` runs every step at a toy's size.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils import deterministic

from prismaquant_ray.backward.block import BlockBackward
from prismaquant_ray.backward.loss import GPU_LOGIT_BYTES, Loss
from prismaquant_ray.calibration.dataset import Batch
from prismaquant_ray.copies import DeviceCopies, HostCopies
from prismaquant_ray.device_checks import device_checks, drawn
from prismaquant_ray.families import family_of
from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.forward.block import BlockCandidates, BlockForward
from prismaquant_ray.forward.encode import Rounding
from prismaquant_ray.forward.gptq import Gptq, HessianFactor, factorize, gptq
from prismaquant_ray.forward.scale_search import ScaleSearch, nearest, searched
from prismaquant_ray.layout import Block
from prismaquant_ray.model.layout_builder import transformers_config
from prismaquant_ray.model.on_meta import build_on_meta
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.header import TensorInfo

OFFERED = (FormatName.NVFP4, FormatName.MXFP8, FormatName.BF16)
_ATTENTION = {"num_hidden_layers": 1, "vocab_size": 151_936, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
DENSE = _ATTENTION | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
EXPERTS = _ATTENTION | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What is run through a layer, and what rates are measured with."""

    sequences: int = 4
    length: int = 1024
    microbatches: int = 8
    product: int = 8192
    copied: int = 1 << 30
    judged: tuple[int, int] = (256, 4096)
    repeats: int = 5


TOY = Sizes(sequences=2, length=32, microbatches=2, product=64, copied=1 << 16, judged=(16, 128), repeats=2)


class RandomWeights:
    """A model whose weights are random numbers, made when they are read."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.store = SimpleNamespace(uri="random weights")
        generator = torch.Generator().manual_seed(0)
        self._numbers = (0.02 * torch.randn((1 << 22) + 17, generator=generator)).bfloat16()
        family = family_of(config["architectures"][0])
        assert family is not None
        model = build_on_meta(transformers_config(self), config["architectures"][0])  # type: ignore[arg-type]
        self.tensors: dict[str, TensorInfo] = {}
        for ours, tensor in model.named_parameters():
            name, shape = family.checkpoint_name(ours), tuple(tensor.shape)
            size = 2 * math.prod(shape)
            self.tensors[name] = TensorInfo(name=name, file="", dtype="BF16", shape=shape, start=0, stop=size)
        self.stored = self.tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Normal numbers of deviation 0.02, and ones for norms."""
        return {name: self._made(self.tensors[name].shape) for name in names}

    def _made(self, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        count = math.prod(shape)
        return self._numbers.repeat(-(-count // len(self._numbers)))[:count].view(shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """A stage: milliseconds, its bound at the card's rates, and their quotient."""

    ms: float
    bound_ms: float | None = None
    share: float | None = None
    waits: int | None = None


@dataclass
class Card:
    """The device, and what it was found to do: FLOP/s of products in BF16 and float32, bytes/s of its memory."""

    device: torch.device
    sizes: Sizes
    products: float = math.nan
    single: float = math.nan
    memory: float = math.nan

    def seconds(self, action: Callable[[], object], repeats: int | None = None) -> float:
        """The median time of an action after a first try."""
        action()
        return statistics.median(self._once(action) for _ in range(repeats or self.sizes.repeats))

    def _once(self, action: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            begun = time.perf_counter()
            action()
            return time.perf_counter() - begun
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def timing(self, seconds: float, *, own: float = 0.0, single: float = 0.0, moved: float = 0.0) -> Timing:
        """With the bound of FLOP in the model's type and in float32, and of bytes to and from memory."""
        bound = max(own / self.products + single / self.single, moved / self.memory)
        return Timing(ms=1000 * seconds, bound_ms=1000 * bound, share=bound / seconds if bound else None)

    def waits(self, action: Callable[[], object]) -> int | None:
        """How often torch says that an action makes the host wait."""
        if self.device.type == "cpu":
            return None
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                action()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in found)

    def peak(self) -> float | None:
        """Most bytes of the device since this was last asked, in GB."""
        if self.device.type == "cpu":
            return None
        found = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return found


# Steps -------------------------------------------------------------------------------------------------------------


def card_facts(card: Card) -> dict[str, Any]:
    """Hardware and software."""
    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if card.device.type == "cuda":
        capability = torch.cuda.get_device_capability()
        found |= {
            "name": torch.cuda.get_device_name(),
            "capability": f"{capability[0]}.{capability[1]}",
            "memory GB": torch.cuda.mem_get_info()[1] / 1e9,
            "CUDA": torch.version.cuda,
        }
    return found


def arithmetic(card: Card) -> list[dict[str, Any]]:
    """What `doctor` checks, in every format and both types."""
    formats = [name for name in FORMATS if FORMATS[name].codec is not None]
    with torch.no_grad():
        checks = device_checks(card.device, formats, torch.bfloat16)
        checks += device_checks(card.device, formats[:0], torch.float32)
    return [asdict(check) for check in checks]


@torch.no_grad()
def bits(card: Card) -> dict[str, dict[str, int]]:
    """By codec, of a matrix: scales and values that differ from the CPU's, by search and by GPTQ from equal scales."""
    rows, columns = card.sizes.judged
    weight = (drawn(rows, columns, seed=1) * 0.02).bfloat16().float()
    inputs = drawn(2 * columns, columns, seed=2) @ (torch.eye(columns) + drawn(columns, columns, seed=3) / columns**0.5)
    hessian = inputs.T @ inputs
    factor = factorize(hessian, Gptq())
    there = HessianFactor(upper=factor.upper.to(card.device), order=factor.order.to(card.device))
    found = {}
    for name, codec in codecs_of([*FORMATS]).items():
        scale = codec.global_scale(weight.abs().amax().view(1))
        moved = None if scale is None else scale.to(card.device)
        ours, theirs = (
            searched(w, codec, s, h.diagonal(), ScaleSearch()) if codec.searched else nearest(w, codec, s)
            for w, s, h in (
                (weight, scale, hessian),
                (weight.to(card.device), moved, hessian.to(card.device)),
            )
        )
        # GPTQ begins with the CPU's scales on both, so that only its own differences count.
        begun = nearest(weight.to(card.device), codec, moved)
        here = gptq(weight, nearest(weight, codec, scale), codec, factor)
        away = gptq(weight.to(card.device), begun, codec, there)
        found[name] = {
            "values": weight.numel(),
            "searched values that differ": _differing(ours.values, theirs.values),
            "nearest values that differ": _differing(nearest(weight, codec, scale).values, begun.values),
            "GPTQ values that differ": _differing(here.values, away.values),
        }
    return found


def _differing(ours: Tensor, theirs: Tensor) -> int:
    return int((ours.cpu().float() != theirs.cpu().float()).sum())


@torch.no_grad()
def rates(card: Card) -> dict[str, float]:
    """Products in BF16 and float32, memory, copies both ways, the host's time of a launch; sets those of the card."""
    side, device, size = card.sizes.product, card.device, card.sizes.copied
    a, b = (drawn(side, side, seed=seed).to(device) for seed in (4, 5))
    card.single = 2 * side**3 / card.seconds(lambda: a @ b)
    a, b = a.bfloat16(), b.bfloat16()
    card.products = 2 * side**3 / card.seconds(lambda: a @ b)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    card.memory = 2 * size / card.seconds(lambda: target.copy_(source))
    to_device, to_host = DeviceCopies(device), HostCopies(device)
    pageable = torch.ones(size, dtype=torch.uint8)

    def back() -> None:
        to_host.take(source)
        to_host.wait()

    one = torch.ones((), device=device)
    launches = 1000

    def launch() -> None:
        for _ in range(launches):
            one.add_(1)

    begun = time.perf_counter()
    launch()
    host = (time.perf_counter() - begun) / launches
    return {
        "TFLOP/s in BF16": card.products / 1e12,
        "TFLOP/s in float32": card.single / 1e12,
        "memory GB/s": card.memory / 1e9,
        "to the device GB/s": size / card.seconds(lambda: to_device.take(pageable)) / 1e9,
        "to the host GB/s": size / card.seconds(back) / 1e9,
        "us of a launch": 1e6 * host,
    }


@dataclass
class Layer:
    """A layer with its inputs; `encoded` is filled by `forward`, and `backward` prices the last of them."""

    card: Card
    config: dict[str, Any]
    encoded: list[BlockCandidates] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runner = ModelRunner(RandomWeights(self.config), dtype=torch.bfloat16, device=self.card.device)  # type: ignore[arg-type]
        self.block: Block = self.runner.layout.blocks[0]
        sizes = self.card.sizes
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.runner.layout.vocab_size, (sizes.sequences, sizes.length), generator=generator)
        held_out = torch.arange(sizes.sequences) == sizes.sequences - 1
        self.batch = Batch(inputs={"input_ids": tokens}, holdout=held_out, first_sequence=0)
        shape = (sizes.sequences, sizes.length, self.runner.layout.hidden_size)
        self.hidden = [drawn(*shape, seed=100 + n).bfloat16().to(self.card.device) for n in range(sizes.microbatches)]

    @property
    def tokens(self) -> int:
        """Of a microbatch."""
        return self.batch.tokens.numel()

    @property
    def active(self) -> float:
        """Weights that a token is multiplied by."""
        each = self.block.linears
        top = self.runner.layout.top_k
        return sum(linear.parameters * (top / linear.experts if linear.experts else 1) for linear in each)

    @property
    def hessian_flop(self) -> float:
        """Of a microbatch; experts' are summed for all together, and each by itself at the end."""
        top = self.runner.layout.top_k
        return sum(2 * self.tokens * g.in_features**2 * (top if g.experts else 1) for g in self.block.inputs)

    @property
    def encoding_flop(self) -> float:
        """In float32: errors of three attempts, errors pushed on, factorizations."""
        codecs = len(codecs_of(OFFERED))
        products = sum(7 * codecs * linear.parameters * linear.in_features for linear in self.block.linears)
        return products + sum(group.in_features**3 * (group.experts or 1) for group in self.block.inputs)

    def visited(self, formats: tuple[FormatName, ...]) -> BlockForward:
        """The block behind every microbatch of the forward pass."""
        block = BlockForward(self.runner, 0, formats, Rounding())
        for hidden in self.hidden:
            block.run(hidden, self.batch)
        self.runner.checks.settle()
        return block

    def forward(self) -> dict[str, Any]:
        """Loading, running without and with statistics, encoding."""
        card, parameters = self.card, sum(linear.parameters for linear in self.block.linears)
        self.runner.prefetcher.prefetch([0])
        weights = self.runner.prefetcher.get(0)
        loading = card.seconds(lambda: [self.runner.copies.take(weight) for weight in weights.values()])
        found: dict[str, Any] = {"parameters": parameters, "tokens a microbatch": self.tokens}
        found["loading"] = asdict(card.timing(loading, moved=4 * parameters))
        products = 2 * self.tokens * self.active
        # Between statistics and no statistics lies what they take.
        for name, formats, own in (
            ("forward", (), products),
            ("forward with Hessians", OFFERED, products + self.hessian_flop),
        ):
            block = BlockForward(self.runner, 0, formats, Rounding())

            def run(block: BlockForward = block) -> None:
                block.run(self.hidden[0], self.batch)
                self.runner.checks.settle()

            timing = card.timing(card.seconds(run), own=own, moved=2 * parameters)
            found[name] = asdict(timing) | {"waits": card.waits(run)}
            found[f"{name}, GB"] = card.peak()
        times = []
        for _ in range(2):
            block = self.visited(OFFERED)
            times.append(card._once(lambda block=block: self.encoded.append(block.finish())))  # type: ignore[misc]
        shipped = sum(tensor.nbytes for tensors in self.encoded[-1].tensors.values() for tensor in tensors.values())
        found["encoding"] = asdict(card.timing(min(times), single=self.encoding_flop, moved=2 * parameters + shipped))
        found["encoding, GB"] = card.peak()
        return found

    def backward(self) -> dict[str, Any]:
        """Decoding candidates, recomputing, gradients with prices; everything twice, to compare."""
        card, codecs = self.card, len(codecs_of(OFFERED))
        parameters = sum(linear.parameters for linear in self.block.linears)
        made: list[BlockBackward] = []

        def decode() -> None:
            made.append(BlockBackward(self.runner, 0, OFFERED, self.encoded[-1].tensors))
            del made[:-1]

        found: dict[str, Any] = {}
        decoding = card.seconds(decode, 2)
        found["loading and decoding"] = asdict(card.timing(decoding, moved=2 * parameters * (2 + 2 * codecs)))
        gradients: list[Tensor] = []

        def step() -> None:
            made[-1].forward(self.hidden[0], self.batch)
            gradients.append(made[-1].backward(self.hidden[-1], self.batch))
            del gradients[:-2]
            self.runner.checks.settle()

        own = 2 * self.tokens * self.active * (3 + codecs)
        timing = card.timing(card.seconds(step), own=own, moved=2 * parameters * (3 + codecs))
        found["backward with prices"] = asdict(timing) | {"waits": card.waits(step)}
        found["backward, GB"] = card.peak()
        found["again"] = {"gradients that differ": _differing(*gradients)} | self._again()
        return found

    def _again(self) -> dict[str, int]:
        """Bytes of candidates that differ between two encodings of the same inputs."""
        first, second = (encoded.tensors for encoded in self.encoded[-2:])
        return {
            f"{name} bytes that differ": sum(
                int((tensor.view(-1).view(torch.uint8) != second[name][key].view(-1).view(torch.uint8)).sum())
                for key, tensor in tensors.items()
            )
            for name, tensors in first.items()
        }


def exits(layer: Layer) -> dict[str, Any]:
    """Final norm, head, labels and the gradient of the loss, of a microbatch."""
    card, runner = layer.card, layer.runner
    bytes_ = GPU_LOGIT_BYTES if card.device.type == "cuda" else 1 << 20
    loss = Loss(labels="sampled", seed=0, vocab_size=runner.layout.vocab_size, logit_bytes=bytes_)
    head = runner.layout.vocab_size * runner.layout.hidden_size
    with runner.exit():

        def step() -> None:
            loss.gradient(runner.logits, layer.hidden[0], layer.batch)

        timing = card.timing(card.seconds(step), own=4 * layer.tokens * head, moved=4 * head)
        return asdict(timing) | {"waits": card.waits(step), "GB": card.peak()}


def table(steps: dict[str, Any]) -> str:
    """The timings of the layers and the exit, for docs/performance.md."""
    lines = ["| stage | ms | bound, ms | share of the bound | waits |", "| --- | ---: | ---: | ---: | ---: |"]
    timed = {name: found for name, found in steps.items() if name.partition(" ")[0] in ("dense", "experts")}
    timed["exit"] = {"": steps.get("exit")}
    for step, found in timed.items():
        for stage, timing in found.items():
            if isinstance(timing, dict) and "ms" in timing:
                share = "" if timing["share"] is None else f"{timing['share']:.0%}"
                bound = "" if timing["bound_ms"] is None else f"{timing['bound_ms']:.3g}"
                waits = "" if timing.get("waits") is None else timing["waits"]
                name = f"{step.partition(' ')[0]} {stage}".strip()
                lines.append(f"| {name} | {timing['ms']:.3g} | {bound} | {share} | {waits} |")
    return "\n".join(lines)


# The script --------------------------------------------------------------------------------------------------------


class Report:
    """Steps done within a budget of seconds, written down one by one."""

    def __init__(self, output: Path, budget: float) -> None:
        self.output = output
        self.begun = time.monotonic()
        self.budget = budget
        self.failed = False
        self.steps: dict[str, Any] = {}

    def step(self, name: str, action: Callable[[], Any]) -> None:
        """Do it, unless the time is over."""
        before = time.monotonic() - self.begun
        if before > self.budget:
            self.steps[name] = {"skipped": f"after {before:.0f} s of {self.budget:.0f}"}
        else:
            try:
                self.steps[name] = action()
            except Exception as error:  # noqa: BLE001 - the rest of a rented card's minutes is still worth measuring
                self.failed = True
                self.steps[name] = {"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
        seconds = time.monotonic() - self.begun - before
        print(f"{name}, {seconds:.1f} s: {json.dumps(self.steps[name])}", flush=True)
        self.output.write_text(json.dumps({"command": sys.orig_argv, "steps": self.steps}, indent=1) + "\n")


def measure(device: torch.device, sizes: Sizes, report: Report, *, small: bool) -> None:
    """All steps."""
    # As a worker sets them.
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    card = Card(device, sizes)
    report.step("card", lambda: card_facts(card))
    report.step("checks", lambda: arithmetic(card))
    report.step("bits", lambda: bits(card))
    report.step("rates", lambda: rates(card))
    for name, config in (("dense", DENSE), ("experts", EXPERTS)):
        layers: list[Layer] = []
        chosen = {**config, **{key: value for key, value in SMALL.items() if key in config}} if small else config

        def opened(chosen: dict[str, Any] = chosen, layers: list[Layer] = layers) -> Any:
            layers.append(Layer(card, chosen))
            return layers[0].forward()

        report.step(f"{name} forward", opened)
        report.step(f"{name} backward", lambda layers=layers: layers[0].backward())  # type: ignore[misc]
        if name == "dense":
            report.step("exit", lambda layers=layers: exits(layers[0]))  # type: ignore[misc]
        layers.clear()


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a toy's sizes, to try the script")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which no step begins")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here; to try the script without one: --device cpu --small", file=sys.stderr)
        return 3
    report = Report(options.output, options.budget)
    measure(
        torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu"),
        TOY if options.small else Sizes(),
        report,
        small=options.small,
    )
    print(table(report.steps))
    print(f"written: {options.output}")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
