"""Reports to test: of tiny runs, with measurements made up after the schema of plans/measured.json, and large ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import planning, report
from jobs.run import Run
from prismaquant_ray.config import Config
from prismaquant_ray.report import facts
from prismaquant_ray.storage.store import Store
from tests.inprocess import in_process, unopened
from tests.test_family_pipeline import configuration

#: A name that would end its element, its attribute or a script, if anybody let it.
HOSTILE = "</script><script>document.title='caught'</script><img src=x onerror=\"document.title='caught'\">'&{{7*7}}"


def measured_run(directory: Path, source: Path, *overrides: str, images: int = 0) -> Run:
    """A finished run of a tiny checkpoint; opening it again needs no workers."""
    config = configuration(directory, source, *overrides, images=images)
    Run(config, open_workers=in_process(2)).measure()
    return reopened(config)


def reopened(config: Config) -> Run:
    """The finished run of a configuration."""
    return Run(config, open_workers=unopened)


def add_measurements(run: Run, draft: bool = False) -> dict[str, Any]:
    """Write plausible figures of every plan and control into the run store."""

    def figures(kl: float) -> dict[str, Any]:
        found = {"tokens": 1024, "kl_mean": kl, "kl_standard_error": 0.02 * kl, "kl_p90": 2 * kl, "kl_p99": 6 * kl}
        found |= {"top1_agreement": 1 - kl / 2, "loss": 2.8 + kl, "perplexity": 17.2 * (1 + kl)}
        return found | ({"draft_agreement": 0.71} if draft else {})

    plans: list[dict[str, Any]] = []
    for plan in planning.sweep_targets(run)["targets"]:
        loss = plan["predicted_loss"] + 1e-3
        kept = ("target", "objective", "bpp", "weight_bytes", "groups", "predicted_loss", "standard_error", "choice")
        entry = {key: plan[key] for key in kept}
        plans.append(entry | {"kind": "plan", "label": plan["target"], "activations": figures(loss)})
        plans[-1]["weights"] = figures(loss / 3)
        mixed = dict.fromkeys(plan["choice"], "BF16")
        plans.append(entry | {"kind": "mixture", "label": f"{plan['target']}, mixed", "choice": mixed})
        plans[-1] |= {"weights": None, "activations": figures(1.4 * loss)}
    for name in ("NVFP4", "MXFP8"):
        plans.append({"kind": "uniform", "label": f"all {name}", "target": None, "bpp": 4.5, "weights": None})
        plans[-1] |= {"activations": figures(0.2), "choice": {}, "predicted_loss": 0.2}
    body = {
        "text": {"file": "evaluation.txt", "sha256": "0" * 64, "sequences": 2, "tokens": 1024, "images": 0},
        "calibration_tokens": 192,
        "source": {"loss": 2.8, "perplexity": 17.2} | ({"draft_agreement": 0.8} if draft else {}),
        "plans": plans,
        "knee": {"bpp": 5.25, "kl": 0.13, "from_bpp": 4.5, "to_bpp": 8.25, "stability": []},
    }
    run.store.put("plans/measured.json", json.dumps(body).encode())
    return body


def enlarged(small: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The report of a model like a small dense one, with so many layers and a name that means harm."""
    found: dict[str, Any] = copy.deepcopy(dict(small))
    decoder = [block for block in found["blocks"] if block["kind"] == "decoder"]
    assert len(decoder) == len(found["blocks"]), "a dense one, please"
    rows = [row for row, block in enumerate(found["groups"]["block"]) if block == decoder[0]["index"]]
    found["blocks"] = [
        {"index": i, "kind": "decoder", "prefix": f"model.layers.{i}", "label": str(i)} for i in range(layers)
    ]

    def repeated(values: list[Any]) -> list[Any]:
        return [values[row] for _ in range(layers) for row in rows]

    groups = found["groups"]
    for key, values in groups.items():
        groups[key] = (
            {name: repeated(v) for name, v in values.items()} if isinstance(values, dict) else repeated(values)
        )
    # Layers differ, as those of a model do.
    for values in groups["cost"].values():
        values[:] = [None if v is None else v * (1 + 0.01 * (row // len(rows))) for row, v in enumerate(values)]
    groups["block"] = [layer for layer in range(layers) for _ in rows]
    groups["name"] = [
        f"model.layers.{layer}.{module}" for layer, module in zip(groups["block"], groups["module"], strict=True)
    ]
    for plan in found["plans"]:
        plan["choice"] = "".join(repeated(list(plan["choice"])))
    linears = [entry for entry in found["rounding"]["linears"] if entry["block"] == decoder[0]["index"]]
    found["rounding"]["linears"] = [
        {**entry, "block": layer, "linear": f"model.layers.{layer}.{entry['module']}"}
        for layer in range(layers)
        for entry in linears
    ]
    choice = found["plans"][found["budget"]]["choice"]
    found["composition"] = facts.composition(groups, found["blocks"], found["formats"], choice)
    found["model"]["title"] = groups["name"][0] = HOSTILE
    found["model"]["kept"] = {HOSTILE: [HOSTILE]}
    return found


def written(run: Run, directory: Path) -> tuple[dict[str, Any], Path]:
    """The report of a run, written into a directory, and its page."""
    found = report.gather(run)
    report.write(found, Store(directory), "")
    return found, directory / "report.html"
