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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.decoded import Decoded, decoded, decoded_group
from benchmarks.resident import ResidentModel
from prismaquant_ray import BudgetConfig, FormatName, InputError, OpenRun, dequantize_weight, load_config, open_run
from prismaquant_ray.calibration.text import load_sequences
from prismaquant_ray.layout import BlockKind
from prismaquant_ray.source.protocol import TensorSource

TEXT = Path(__file__).parents[1] / "configs" / "data" / "evaluation.txt"
LENGTH = 512
AT_ONCE = 4


def resident(run: OpenRun, sequences: int) -> ResidentModel:
    """The run's model, with sequences of the evaluation text.

    Raises:
        InputError: it is more than a dense decoder.
    """
    if any(block.kind is not BlockKind.DECODER for block in run.layout.blocks) or run.layout.top_k:
        raise InputError(f"{run.layout.architecture} is more than a dense decoder; see benchmarks.trained")
    source = Path(run.config.model.source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = load_sequences(TEXT, tokenizer, sequences=sequences, length=LENGTH, seed=0, holdout=0.0)
    return ResidentModel(source, text.tokens, at_once=AT_ONCE)


def linears(model: ResidentModel, groups: Mapping[str, Decoded]) -> dict[tuple[str, str], nn.Linear]:
    """The Linears of fused groups, by group and parameter."""
    return {
        (name, path): model.block_of(name).get_submodule(path.removesuffix(".weight"))
        for name, group in groups.items()
        for path in group.weights
    }


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


def assembled(run: OpenRun, bpp: float) -> tuple[dict[str, Decoded], TensorSource]:
    """The decoded groups of a repository at a budget, and what else it ships."""
    plan = run.plan(BudgetConfig(bpp=bpp))
    with tempfile.TemporaryDirectory(prefix="quality") as directory:
        repository = Path(directory) / "repository"
        run.assemble(plan, repository)
        return decoded(repository, run.layout.groups), run.shipped(plan.choice)


def output_error(run: OpenRun) -> dict[str, Any]:
    """Held-out output MSE of stored NVFP4 weights against round-to-nearest, per Linear.

    Raises:
        InputError: the run is equalized: its matrices are not the source's.
    """
    if run.config.rounding.equalize:
        raise InputError("round-to-nearest is compared on the source's own weights: --set rounding.equalize=false")
    model = resident(run, 8)
    groups, _ = assembled(run, 4.5)
    ratios: dict[str, float] = {}

    def hook(name: str, weight: Tensor) -> Any:
        def record(module: nn.Linear, args: tuple[Tensor, ...], _: Tensor) -> None:
            x = args[0].flatten(0, -2)
            error = (x @ (weight - module.weight).T).square().mean()
            nearest = (x @ (nearest_by_compressed_tensors(module.weight.data) - module.weight).T).square().mean()
            ratios[name] = ratios.get(name, 0.0) + float(error / nearest) / len(model.entering)

        return record

    for (group, path), linear in linears(model, groups).items():
        name = f"{run.layout.block_of[group].prefix}.{path.removesuffix('.weight')}"
        linear.register_forward_hook(hook(name, groups[group].weights[path]))
    for _ in model.run():
        pass
    worst = max(ratios, key=lambda name: ratios[name])
    mean = math.exp(sum(math.log(ratio) for ratio in ratios.values()) / len(ratios))
    return {"linears": len(ratios), "geometric_mean": mean, "worst": ratios[worst], "worst_linear": worst}


def divergence(run: OpenRun, budgets: tuple[float, ...]) -> dict[str, Any]:
    """Token KL against the source at each budget, weights only and with activations rounded."""
    model = resident(run, 24)
    clean = list(model.run())
    results: dict[str, Any] = {"tokens": model.tokens.numel()}

    def measured(groups: Mapping[str, Decoded], shipped: TensorSource) -> dict[str, float]:
        with model.quantized(groups, shipped, activations=False):
            alone, _ = model.compared(clean, model.run())
        with model.quantized(groups, shipped, activations=True):
            both, agrees = model.compared(clean, model.run())
        return {
            "weights_only": float(alone.mean()),
            "with_activations": float(both.mean()),
            "top1_with_activations": float(agrees.double().mean()),
        }

    for bpp in budgets:
        groups, shipped = assembled(run, bpp)
        predicted = run.plan(BudgetConfig(bpp=bpp)).predicted_loss
        results[f"{bpp:g}"] = {**measured(groups, shipped), "predicted": predicted}
        # The input scales of an equalized run are not for the source's own inputs.
        if not run.config.rounding.equalize and all(group.format is FormatName.NVFP4 for group in groups.values()):
            results["round-to-nearest NVFP4 by compressed-tensors"] = measured(nearest(model, groups), shipped)
    return results


def nearest(model: ResidentModel, groups: Mapping[str, Decoded]) -> dict[str, Decoded]:
    """The same groups with the source's weights rounded to nearest."""
    weights: dict[str, dict[str, Tensor]] = {}
    for (name, path), linear in linears(model, groups).items():
        weights.setdefault(name, {})[path] = nearest_by_compressed_tensors(linear.weight.data)
    return {name: replace(group, weights=weights[name]) for name, group in groups.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One fused group in one format, alone in a model that is otherwise the source; nats per token."""

    group: str
    format: str
    linears: int
    predicted: float
    fisher_trace: float
    measured: float


def prediction(run: OpenRun, every: int = 3) -> dict[str, Any]:
    """One fused group quantized at a time: predicted cost against measured KL, for every `every`-th group.

    Groups of one Linear (o_proj, down_proj) are also reported alone; `each` holds every pair, for
    `benchmarks.plot_prediction`.
    """
    model = resident(run, 4)
    boundaries = [model.entering]
    for index in range(len(model.blocks)):
        boundaries.append(list(model.run(boundaries[-1], range(index, index + 1))))
    table = run.prices()
    pairs: list[Pair] = []
    source = dict.fromkeys(table.groups, FormatName.BF16)
    for group in run.layout.groups[::every]:
        first = run.layout.block_of[group.name].index
        row = table.groups.index(group.name)
        for column, name in enumerate(table.formats):
            tensors = run.candidate(group.name, name)
            if not tensors:
                continue

            def weight_of(
                module: str, name: FormatName = name, tensors: Mapping[str, Tensor] = tensors
            ) -> tuple[Tensor, Tensor | None]:
                own = {k.removeprefix(f"{module}."): v for k, v in tensors.items() if k.startswith(f"{module}.")}
                return dequantize_weight(own, name).float(), own.get("input_global_scale")

            alone = {group.name: decoded_group(group, name, weight_of)}
            with model.quantized(alone, run.shipped(source | {group.name: name}), activations=True):
                entering = boundaries[first]
                kl, _ = model.compared(boundaries[-1], model.run(entering, range(first, len(model.blocks))))
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


def targets(run: OpenRun) -> dict[str, float]:
    """How far below each target of the sweep the optimal plan is, in bits per parameter."""
    return {plan.target: float(plan.target.removesuffix("bpp")) - plan.bpp for plan in run.sweep().targets}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--parts", default="error,kl,prediction,sweep")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    run = open_run(load_config(arguments.config, arguments.overrides))
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
