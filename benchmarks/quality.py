"""Quality of a finished run, measured: output error, token KL at two budgets, predicted against measured KL.

    .venv/bin/python -m benchmarks.quality configs/demo.yaml [--set key=value …] [--parts error,kl,prediction,sweep]

Weights come from assembled repositories and are decoded by compressed-tensors; nothing of ours decodes them. The
evaluation text shares no passage with the calibration text. Results are printed as one JSON object. For dense models
that read text; `benchmarks.trained` measures one with experts.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoTokenizer

from jobs import assemble, planning
from jobs.run import Run
from prismaquant_ray.calibration.text import load_sequences
from prismaquant_ray.config import BudgetConfig, load
from prismaquant_ray.errors import InputError
from prismaquant_ray.evaluation.divergence import SourceLogits
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.layout import BlockKind, FusedGroup, Layout
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.source.resolve import local_files
from prismaquant_ray.storage.record import read_tensors
from prismaquant_ray.storage.store import Store

TEXT = Path(__file__).parents[1] / "configs" / "data" / "evaluation.txt"
LENGTH = 512


class Measured:
    """The source model with every block resident, so that weights can be replaced and tokens run through."""

    def __init__(self, run: Run, sequences: int) -> None:
        self.run = run
        if any(block.kind is not BlockKind.DECODER for block in run.layout.blocks) or run.layout.top_k:
            raise InputError(f"{run.layout.architecture} is more than a dense decoder; see benchmarks.trained")
        self.runner = ModelRunner(run.source, dtype=torch.float32, device=torch.device("cpu"))
        self.blocks = [self.runner.load_block(index) for index in range(len(run.layout.blocks))]
        with local_files(run.source) as directory:
            tokenizer = AutoTokenizer.from_pretrained(directory)
        text = load_sequences(TEXT, tokenizer, sequences=sequences, length=LENGTH, seed=0, holdout=0.0)
        self.tokens = text.tokens
        self.batches = text.batches(4)
        with self.runner.entry(), torch.no_grad():
            self.entering = [self.runner.embed(batch.inputs) for batch in self.batches]

    def linear(self, name: str) -> torch.nn.Linear:
        """A Linear of the resident model, by checkpoint name."""
        block = next(b for b in self.run.layout.blocks if name.startswith(f"{b.prefix}."))
        module = self.blocks[block.index].get_submodule(name[len(block.prefix) + 1 :])
        assert isinstance(module, torch.nn.Linear)
        return module

    @torch.no_grad()
    def hidden(self, entering: list[Tensor], first: int = 0) -> Iterator[Tensor]:
        """What leaves the last block for what enters block `first`."""
        for hidden, batch in zip(entering, self.batches, strict=True):
            leaving = hidden
            for index in range(first, len(self.blocks)):
                leaving = self.runner.run_block(index, self.blocks[index], leaving, batch.inputs)
            yield leaving

    @torch.no_grad()
    def kl(self, source: list[Tensor], quantized: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """KL per token and top-1 agreement, from what leaves the last block in both models."""
        kls, agrees = [], []
        with self.runner.exit():
            for clean, rounded in zip(source, quantized, strict=True):
                for row in range(clean.shape[0]):
                    p, q = (self.runner.logits(hidden[row : row + 1])[0] for hidden in (clean, rounded))
                    figures = SourceLogits(p, torch.full((len(p),), -1)).against(q)
                    kls.append(figures.kl)
                    agrees.append(figures.agrees)
        return torch.cat(kls), torch.cat(agrees)

    @contextmanager
    def weights(self, replaced: dict[str, Tensor]) -> Iterator[None]:
        """These Linears have these weights inside the with-block."""
        saved = {name: self.linear(name).weight.data for name in replaced}
        for name, weight in replaced.items():
            self.linear(name).weight.data = weight
        try:
            yield
        finally:
            for name, weight in saved.items():
                self.linear(name).weight.data = weight

    @contextmanager
    def rounded_activations(self, formats: dict[str, tuple[FormatName, Tensor | None]]) -> Iterator[None]:
        """Inputs of these Linears are rounded as their format's runtime does."""
        handles = []
        for name, (format_name, scale) in formats.items():
            rounding = FORMATS[format_name].round_activation
            if rounding is None:
                continue

            def hook(_: Any, args: tuple[Tensor, ...], rounding: Any = rounding, scale: Any = scale) -> tuple[Tensor]:
                x = args[0]
                return (rounding(x.flatten(0, -2), scale).view_as(x),)

            handles.append(self.linear(name).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def decoded(repository: Path, layout: Layout) -> tuple[dict[str, Tensor], dict[str, tuple[FormatName, Tensor | None]]]:
    """Weights of every quantized Linear by compressed-tensors, and each one's format and input scale."""
    checkpoint = Checkpoint(Store(repository))
    groups = checkpoint.config["quantization_config"]["config_groups"].values()
    schemes = {json.dumps(g["weights"], sort_keys=True) + str(g["input_activations"]): g for g in groups}
    choice = json.loads((repository / "prismaquant.json").read_text())["choice"]
    weights, formats = {}, {}
    members: dict[str, dict[str, Tensor]] = {}
    for name in checkpoint.tensors:
        module, _, suffix = name.rpartition(".")
        members.setdefault(module, {})[suffix] = checkpoint.read([name])[name]
    by_linear = {linear.name: FormatName(choice[group.name]) for group in layout.groups for linear in group.linears}
    for module, tensors in members.items():
        name = by_linear.get(module)
        if name is None or name is FormatName.BF16:
            continue
        scale = tensors.pop("input_global_scale", None)
        in_features = (
            tensors["weight_packed"].shape[1] * 2 if "weight_packed" in tensors else tensors["weight"].shape[1]
        )
        spec = FORMATS[name]
        assert spec.scheme is not None
        args, activations = spec.scheme(in_features)
        group = schemes[json.dumps(args, sort_keys=True) + str(activations)]
        scheme = QuantizationScheme(targets=[module], weights=group["weights"], input_activations=activations)
        compressor = BaseCompressor.get_value_from_registry(group["format"])
        weights[module] = compressor.decompress(tensors, scheme)["weight"].to(torch.bfloat16).float()
        formats[module] = name, scale
    return weights, formats


def nearest_by_compressed_tensors(weight: Tensor) -> Tensor:
    """NVFP4 round-to-nearest of one Linear, every step compressed-tensors' own."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = preset_name_to_scheme("NVFP4", ["Linear"]).weights
    divisor = generate_gparam(weight.min().reshape(1), weight.max().reshape(1))
    groups = weight.unflatten(-1, (-1, 16))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=divisor)
    return fake_quantize(weight, scale, zero, args, global_scale=divisor).to(torch.bfloat16).float()


def assembled(run: Run, bpp: float) -> Path:
    """A repository at a budget, in a temporary directory."""
    directory = Path(tempfile.mkdtemp(prefix="quality")) / "repository"
    budget = BudgetConfig(bpp=bpp)
    store = run.config.store.model_copy(update={"output": directory})
    again = Run(run.config.model_copy(update={"budget": budget, "store": store}))
    assemble.build(again, planning.allocate(again))
    return directory


def output_error(run: Run) -> dict[str, Any]:
    """Held-out output MSE of stored NVFP4 weights against round-to-nearest, per Linear."""
    model = Measured(run, 8)
    weights, _ = decoded(assembled(run, 4.5), run.layout)
    ratios: dict[str, float] = {}

    def hook(name: str) -> Any:
        def record(module: torch.nn.Linear, args: tuple[Tensor, ...], _: Tensor) -> None:
            x = args[0].flatten(0, -2)
            error = (x @ (weights[name] - module.weight).T).square().mean()
            nearest = (x @ (nearest_by_compressed_tensors(module.weight.data) - module.weight).T).square().mean()
            ratios[name] = ratios.get(name, 0.0) + float(error / nearest) / len(model.entering)

        return record

    handles = [model.linear(name).register_forward_hook(hook(name)) for name in weights]
    for _ in model.hidden(model.entering):
        pass
    for handle in handles:
        handle.remove()
    worst = max(ratios, key=lambda name: ratios[name])
    mean = math.exp(sum(math.log(ratio) for ratio in ratios.values()) / len(ratios))
    return {"linears": len(ratios), "geometric_mean": mean, "worst": ratios[worst], "worst_linear": worst}


def divergence(run: Run, budgets: tuple[float, ...]) -> dict[str, Any]:
    """Token KL against the source at each budget, weights only and with activations rounded."""
    model = Measured(run, 24)
    clean = list(model.hidden(model.entering))
    results: dict[str, Any] = {"tokens": model.tokens.numel()}

    def measured(weights: dict[str, Tensor], formats: dict[str, tuple[FormatName, Tensor | None]]) -> dict[str, float]:
        with model.weights(weights):
            alone, _ = model.kl(clean, model.hidden(model.entering))
            with model.rounded_activations(formats):
                both, agrees = model.kl(clean, model.hidden(model.entering))
        return {
            "weights_only": float(alone.mean()),
            "with_activations": float(both.mean()),
            "top1_with_activations": float(agrees.double().mean()),
        }

    for bpp in budgets:
        weights, formats = decoded(assembled(run, bpp), run.layout)
        predicted = planning.allocate(Run(run.config.model_copy(update={"budget": BudgetConfig(bpp=bpp)})))
        results[f"{bpp:g}"] = {**measured(weights, formats), "predicted": predicted["predicted_loss"]}
        if all(name is FormatName.NVFP4 for name, _ in formats.values()):
            nearest = {name: nearest_by_compressed_tensors(model.linear(name).weight.data) for name in weights}
            results["round-to-nearest NVFP4 by compressed-tensors"] = measured(nearest, formats)
    return results


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One fused group in one format, alone in a model that is otherwise the source; nats per token."""

    group: str
    format: str
    linears: int
    predicted: float
    fisher_trace: float
    measured: float


def prediction(run: Run, every: int = 3) -> dict[str, Any]:
    """One fused group quantized at a time: predicted cost against measured KL, for every `every`-th group.

    Groups of one Linear (o_proj, down_proj) are also reported alone; `each` holds every pair, for
    `benchmarks.plot_prediction`.
    """
    model = Measured(run, 4)
    with torch.no_grad():
        boundaries = [model.entering]
        for index, block in enumerate(model.blocks):
            entering = zip(boundaries[-1], model.batches, strict=True)
            boundaries.append([model.runner.run_block(index, block, x, batch.inputs) for x, batch in entering])
    table = run.table
    pairs: list[Pair] = []
    groups: list[FusedGroup] = [group for position, group in enumerate(run.layout.groups) if position % every == 0]
    for group in groups:
        block = run.layout.block_of[group.name]
        row = table.groups.index(group.name)
        for column, name in enumerate(table.formats):
            codec = FORMATS[name].codec
            if codec is None:
                continue
            stored = read_tensors(run.store, run.candidates.artifacts[block.index, name])
            weights, formats = {}, {}
            for linear in group.linears:
                own = {
                    k.removeprefix(f"{linear.name}."): v for k, v in stored.items() if k.startswith(f"{linear.name}.")
                }
                weights[linear.name] = codec.decode(own).float()
                formats[linear.name] = name, own.get("input_global_scale")
            with model.weights(weights), model.rounded_activations(formats):
                kl, _ = model.kl(boundaries[-1], model.hidden(boundaries[block.index], block.index))
            pairs.append(
                Pair(
                    group=group.name,
                    format=str(name),
                    linears=len(group.linears),
                    predicted=float(table.token_fisher[row, column]),
                    fisher_trace=float(table.fisher_trace[row, column]),
                    measured=float(kl.mean()),
                )
            )
    return {
        **_agreement(pairs),
        "by_format": {
            name: _agreement([pair for pair in pairs if pair.format == name])
            for name in sorted({pair.format for pair in pairs})
        },
        "single_linears": _agreement([pair for pair in pairs if pair.linears == 1]),
        "tokens": model.tokens.numel(),
        "each": [asdict(pair) for pair in pairs],
    }


def _agreement(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How the predicted costs of some pairs follow what was measured; and those of the other objective, by rank."""
    measured = [pair.measured for pair in pairs]
    return {
        "pairs": len(pairs),
        "rank_correlation": float(spearmanr([pair.predicted for pair in pairs], measured).statistic),
        "median_ratio": float(torch.tensor([pair.predicted / pair.measured for pair in pairs]).median()),
        "fisher_trace": {
            "rank_correlation": float(spearmanr([pair.fisher_trace for pair in pairs], measured).statistic),
            "median_ratio": float(torch.tensor([pair.fisher_trace / pair.measured for pair in pairs]).median()),
        },
    }


def targets(run: Run) -> dict[str, float]:
    """How far below each target of the sweep the optimal plan is, in bits per parameter."""
    swept = planning.sweep_targets(run)
    return {plan["target"]: float(plan["target"].removesuffix("bpp")) - plan["bpp"] for plan in swept["targets"]}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--parts", default="error,kl,prediction,sweep")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    run = Run(load(arguments.config, arguments.overrides))
    parts = {
        "error": lambda: output_error(run),
        "kl": lambda: divergence(run, (4.5, 5.5)),
        "prediction": lambda: prediction(run),
        "sweep": lambda: targets(run),
    }
    results = {}
    for name in arguments.parts.split(","):
        started = time.monotonic()
        results[name] = {**parts[name](), "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
