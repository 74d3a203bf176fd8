"""A trained model at equal bytes: our plan against mixtures of NVFP4 and MXFP8 that know no sensitivity.

    .venv/bin/python -m benchmarks.trained [--minutes 6] [--out runs/trained]

Trains the model of `benchmarks.training` unless its checkpoint is there, runs the product on it, and measures
KL(source ‖ quantized) in nats per token on text that neither training nor calibration has seen. Weights are those of
assembled repositories, decoded by compressed-tensors. Each budget has as controls random assignments of fused groups
to MXFP8, the others NVFP4, and the first groups in depth order; all of them have at least the bytes of our plan.
Some are measured once more with every token sent to the experts that the source sends it to: what is left is what a
second-order price can see, the rest is tokens that change their expert. Tables are printed; everything goes to
results/trained.json.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

# Before torch comes: on a machine with other work, threads that spin while they wait for each other take all its time.
os.environ["OMP_WAIT_POLICY"] = "passive"

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks import results
from benchmarks.decoded import Decoded, decoded
from benchmarks.resident import ResidentModel
from benchmarks.training import EVALUATED, HELD_OUT_TEXT, TRAINING_TEXT, Training, trained, windows
from prismaquant_ray import BudgetConfig, Config, FormatName, OpenRun, open_run
from prismaquant_ray.records import PlanRecord
from prismaquant_ray.source.protocol import TensorSource

BUDGETS = (5.0, 5.75, 6.75)
CALIBRATION = 64  # sequences
RANDOM = 6
PIECE = 8  # sequences at a time
QUANTIZED = (FormatName.NVFP4, FormatName.FP8, FormatName.MXFP8)
KINDS = ("weights_only", "with_activations")


class Router:
    """Watches one router: remembers what the source chose, counts other choices, or holds them to the source's."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.source: list[Tensor] = []
        self.recording = self.held = False
        self.moved = self.calls = 0
        module.register_forward_hook(self._hook)

    def _hook(self, _: Any, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, chosen = output
        if self.recording:
            self.source.append(chosen)
            return output
        source = self.source[self.calls % len(self.source)]
        self.calls += 1
        self.moved += int((chosen.sort(-1).values != source.sort(-1).values).any(-1).sum())
        if not self.held:
            return output
        probabilities = torch.softmax(logits.float(), dim=-1).gather(-1, source)
        return logits, (probabilities / probabilities.sum(-1, keepdim=True)).to(scores), source


class RoutedModel(ResidentModel):
    """The source model with its routers watched."""

    def __init__(self, source: Path, tokens: Tensor) -> None:
        super().__init__(source, tokens, at_once=PIECE)
        self.routers = [Router(module.get_submodule("mlp.gate")) for module in self.blocks]

    @cached_property
    def source(self) -> list[Tensor]:
        """What leaves the last block of the source model."""
        for router in self.routers:
            router.recording = True
        found = list(self.run())
        for router in self.routers:
            router.recording = False
        return found

    def loss(self) -> float:
        """Cross-entropy of the source model in nats per token."""
        pairs = zip(self.logits(self.source), self.tokens, strict=True)
        losses = [torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]) for logits, tokens in pairs]
        return float(torch.stack(losses).mean())

    def divergence(
        self, groups: Mapping[str, Decoded], shipped: TensorSource, *, activations: bool, held: bool = False
    ) -> dict[str, Any]:
        """KL of the source and the model as in `quantized`; means by sequence under `by_sequence`.

        `rerouted` is the share of (token, layer) pairs that the router sends to other experts than in the source;
        `held` sends them where the source does all the same.
        """
        source = self.source
        for router in self.routers:
            router.held, router.moved, router.calls = held, 0, 0
        with self.quantized(groups, shipped, activations=activations):
            kl, agrees = self.compared(source, self.run())
        return {
            "kl": float(kl.flatten().mean()),
            "p99": float(kl.flatten().quantile(0.99)),
            "top1": float(agrees.double().mean()),
            "rerouted": sum(router.moved for router in self.routers) / (len(self.routers) * self.tokens.numel()),
            "by_sequence": kl.mean(1).tolist(),
        }


# ------------------------------------------------------------------------------------------------ the product


def configuration(source: Path, out: Path, length: int) -> Config:
    """As a user would write it."""
    return Config.model_validate(
        {
            "model": {"source": str(source)},
            "calibration": {"text": str(TRAINING_TEXT), "sequences": CALIBRATION, "length": length},
            "budget": {"bpp": BUDGETS[0]},
            "cluster": {"address": "local", "workers": 2, "threads": 1},
            "store": {"run": str(out / "run"), "output": str(out / "repository")},
        }
    )


def repository_of(run: OpenRun, plan: PlanRecord) -> dict[str, Decoded]:
    """What a runtime would compute with: the plan's repository, assembled, verified and decoded."""
    with tempfile.TemporaryDirectory(prefix="trained") as directory:
        output = Path(directory) / "repository"
        run.assemble(plan, output)
        return decoded(output, run.layout.groups)


class Assignments:
    """Formats of all groups as columns, and what they weigh and are expected to cost."""

    def __init__(self, run: OpenRun) -> None:
        self.problem = run.problem()
        self.parameters = run.layout.parameters
        self.rows = np.arange(len(self.problem.groups))

    def column(self, name: FormatName) -> int:
        """Of a format."""
        return self.problem.formats.index(name)

    def uniform(self, name: FormatName) -> np.ndarray:
        """Every group in a format; one that cannot take it gets the smallest it can."""
        allowed = self.problem.allowed
        smallest = np.where(allowed, self.problem.size, np.iinfo(np.int64).max).argmin(1)
        return np.where(allowed[:, self.column(name)], self.column(name), smallest)

    def mixture(self, order: Sequence[int], least: int) -> np.ndarray:
        """NVFP4 with groups in MXFP8, taken in order where they fit into `least` bytes, and one more to fill it up."""
        small, large = self.uniform(FormatName.NVFP4), self.uniform(FormatName.MXFP8)
        more = self.problem.size[self.rows, large] - self.problem.size[self.rows, small]
        columns, left = small.copy(), least - self.bytes(small)
        for row in order:
            if 0 < more[row] <= left:
                columns[row] = large[row]
                left -= more[row]
        if left > 0:
            rest = [row for row in order if columns[row] == small[row] and more[row] >= left]
            row = min(rest, key=lambda row: more[row])
            columns[row] = large[row]
        return columns

    def bytes(self, columns: np.ndarray) -> int:
        """Codes and group scales."""
        return int(self.problem.size[self.rows, columns].sum())

    def bpp(self, columns: np.ndarray) -> float:
        """Bits of those per quantizable parameter."""
        return 8 * self.bytes(columns) / self.parameters

    def predicted(self, columns: np.ndarray) -> float:
        """Nats per token by the sensitivity table."""
        return float(self.problem.cost[self.rows, columns].sum())

    def choice(self, columns: np.ndarray) -> dict[str, FormatName]:
        """By group."""
        names = [FormatName(self.problem.formats[column]) for column in columns]
        return dict(zip(self.problem.groups, names, strict=True))


class Comparison:
    """Our plans against the controls."""

    def __init__(self, run: OpenRun, model: RoutedModel) -> None:
        self.run = run
        self.model = model
        self.assignments = Assignments(run)
        self.decoded: dict[FormatName, dict[str, Decoded]] = {}
        for name in QUANTIZED:
            choice = self.assignments.choice(self.assignments.uniform(name))
            self.decoded[name] = repository_of(run, run.plan_of(choice, f"all {name}"))

    def entry(self, columns: np.ndarray, quantized: Mapping[str, Decoded], *, held: bool = False) -> dict[str, Any]:
        """Bytes and divergences of one assignment, with `held` also for the source's routing."""
        found: dict[str, Any] = {
            "bytes": self.assignments.bytes(columns),
            "bpp": round(self.assignments.bpp(columns), 5),
            "predicted": self.assignments.predicted(columns),
        }
        shipped = self.run.shipped(self.assignments.choice(columns))
        for kind in KINDS:
            activations = kind == "with_activations"
            found[kind] = self.model.divergence(quantized, shipped, activations=activations)
            if held:
                found[f"{kind}_held"] = self.model.divergence(quantized, shipped, activations=activations, held=True)
        return found

    def mixed(self, columns: np.ndarray) -> dict[str, Decoded]:
        """The groups of the uniform repositories, each in its format."""
        found: dict[str, Decoded] = {}
        for group, name in self.assignments.choice(columns).items():
            if name is not FormatName.BF16:
                candidates = [each[group] for each in self.decoded.values() if group in each]
                found[group] = next(each for each in candidates if each.format is name)
        return found

    def uniform(self, name: FormatName) -> dict[str, Any]:
        """Everything in one format."""
        return self.entry(self.assignments.uniform(name), self.decoded[name], held=True)

    def budget(self, bpp: float) -> dict[str, Any]:
        """Our plan and the controls at one budget."""
        plan = self.run.plan(BudgetConfig(bpp=bpp))
        columns = self.assignments.problem.columns(plan.choice)
        quantized = repository_of(self.run, plan)
        same = self.mixed(columns)
        assert all(torch.equal(same[g].weights[p], w) for g, each in quantized.items() for p, w in each.weights.items())
        ours = self.entry(columns, quantized, held=True) | {"groups": plan.groups, "choice": plan.choice}
        least = ours["bytes"]
        controls = {"by depth": self._control(range(len(columns)), least, held=True)}
        for seed in range(RANDOM):
            order = np.random.default_rng(seed).permutation(len(columns))
            controls[f"random {seed}"] = self._control(order.tolist(), least)
        return {"plan": ours, "controls": controls, "verdict": verdict(ours, controls)}

    def _control(self, order: Sequence[int], least: int, *, held: bool = False) -> dict[str, Any]:
        columns = self.assignments.mixture(order, least)
        assert self.assignments.bytes(columns) >= least
        return self.entry(columns, self.mixed(columns), held=held)


def verdict(ours: Mapping[str, Any], controls: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether the plan has less KL than the mean random control, and than every control."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        own = ours[kind]["kl"]
        random = [control[kind] for name, control in controls.items() if name.startswith("random")]
        mean = statistics.mean(each["kl"] for each in random)
        depth = controls["by depth"][kind]
        found[kind] = {
            "plan": own,
            "random_mean": mean,
            "random_least": min(each["kl"] for each in random),
            "random_most": max(each["kl"] for each in random),
            "random_mean_more": more([each["by_sequence"] for each in random], ours[kind]["by_sequence"]),
            "by_depth": depth["kl"],
            "by_depth_more": more([depth["by_sequence"]], ours[kind]["by_sequence"]),
            "beats_mean": own < mean,
            "beats_every_control": all(own < control[kind]["kl"] for control in controls.values()),
        }
    return found


def more(others: Sequence[Sequence[float]], ours: Sequence[float]) -> dict[str, float]:
    """By how much the mean of others exceeds ours, and its standard error over sequences: all ran on the same ones."""
    difference = np.mean(others, axis=0) - np.array(ours)
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return {"difference": float(difference.mean()), "standard_error": float(error)}


def interpolated(small: Mapping[str, Any], large: Mapping[str, Any], size: int, kind: str) -> float:
    """KL on the straight line between two uniform models, at so many bytes."""
    share = (size - small["bytes"]) / (large["bytes"] - small["bytes"])
    return float((1 - share) * small[kind]["kl"] + share * large[kind]["kl"])


# ------------------------------------------------------------------------------------------------ report


def tables(figures: Mapping[str, Any]) -> str:
    """For people."""
    columns = ("weights only", "routing held", "activations too", "routing held", "predicted")
    lines = [f"{'KL, nats per token':20}" + "".join(f"{column:>17}" for column in columns)]

    def line(name: str, entry: Mapping[str, Any], *words: str) -> None:
        kls = [entry.get(f"{kind}{end}", {}).get("kl") for kind in KINDS for end in ("", "_held")]
        cells = "".join(f"{'':17}" if value is None else f"{value:17.5f}" for value in [*kls, entry["predicted"]])
        lines.append(f"{name:20}{cells}  {' '.join(words)}".rstrip())

    for name, entry in figures["uniform"].items():
        line(f"all {name}, {entry['bpp']:g}", entry)
    for bpp, found in figures["budgets"].items():
        plan = found["plan"]
        counts = ", ".join(f"{count} {name}" for name, count in plan["groups"].items())
        line(f"{bpp} bpp: plan", plan, counts)
        for name, entry in found["controls"].items():
            line(f"  {name}", entry, f"{100 * (entry['bytes'] / plan['bytes'] - 1):+.2f}% bytes")
        for kind in KINDS:
            said = found["verdict"][kind]
            wins = "wins" if said["beats_mean"] else "LOSES"
            every = "and beats every control" if said["beats_every_control"] else "but NOT against every control"
            gaps = [
                f"{name.replace('_', ' ')} {said[f'{name}_more']['difference']:+.5f} ± "
                f"{said[f'{name}_more']['standard_error']:.5f}"
                for name in ("random_mean", "by_depth")
            ]
            lines.append(f"  {kind.replace('_', ' ')}: plan {wins} {every}; {', '.join(gaps)}")
    return "\n".join(lines)


def for_file(value: Any) -> Any:
    """Without the figures of single sequences, and no more digits than mean anything."""
    if isinstance(value, dict):
        return {key: for_file(entry) for key, entry in value.items() if key != "by_sequence"}
    if isinstance(value, list | tuple):
        return [for_file(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    """Train, measure, compare, print and file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="of training, on two idle cores")
    parser.add_argument("--out", type=Path, default=Path("runs/trained"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=results.RESULTS, dest="directory", help="where figures go")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(arguments.threads)
    load_before = os.getloadavg()[0]
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        seconds[stage] = round(time.monotonic() - started, 1)

    training = Training.of_minutes(arguments.minutes)
    source = arguments.out / "source"
    record = trained(training, source)
    seconds["training"] = record["seconds"]  # when it was done, which may be earlier
    # Whatever is in the run store is of another checkpoint or another version of the product.
    run = open_run(configuration(source, arguments.out, training.length), fresh=True)
    with timed("product"):
        run.measure()
    with timed("comparison"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = RoutedModel(source, windows(HELD_OUT_TEXT, tokenizer, training.length, EVALUATED))
        # What the product runs is what transformers runs.
        assert abs(model.loss() - record["losses"]["held_out_text"]) < 1e-3
        comparison = Comparison(run, model)
        uniform = {str(name): comparison.uniform(name) for name in QUANTIZED}
        budgets = {f"{bpp:g}": comparison.budget(bpp) for bpp in BUDGETS}
    figures = {
        "load_before": load_before,
        "seconds": seconds,
        "training": record,
        "calibration": run.config.calibration.model_dump(
            mode="json", include={"sequences", "length", "seed", "holdout"}
        ),
        "evaluation": {"sequences": EVALUATED, "length": training.length, "loss": model.loss()},
        "groups": len(run.layout.groups),
        "quantizable_parameters": run.layout.parameters,
        "uniform": uniform,
        "budgets": budgets,
    }
    for found in budgets.values():
        found["interpolated"] = {
            kind: interpolated(uniform["NVFP4"], uniform["MXFP8"], found["plan"]["bytes"], kind) for kind in KINDS
        }
    print(tables(figures))
    losses = record["losses"]
    print(
        f"\n{record['parameters'] / 1e6:.1f} M parameters, {record['tokens_trained']:,} tokens; loss on what it was "
        f"trained on {losses['training_text']:.3f}, held out {losses['held_out_text']:.3f}; seconds {seconds}"
    )
    results.save("trained", for_file(figures), arguments.directory)


if __name__ == "__main__":
    main()
