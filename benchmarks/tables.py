"""The tables of docs/performance.md, from results/*.json: `python -m benchmarks.tables` writes them into the page.

A table stands between `<!-- NAME -->` and `<!-- / -->`; a test holds the page to what this makes of the results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
_PLACE = re.compile(r"(<!-- ([a-z ]+) -->\n).*?(<!-- / -->)", re.DOTALL)
Figures = dict[str, Any]


def filled(text: str) -> str:
    """The page with every table as the results have it; KeyError for a name that is none."""
    return _PLACE.sub(lambda found: found[1] + "\n".join(TABLES[found[2]]()) + "\n" + found[3], text)


def stored(name: str) -> Figures:
    """A benchmark's figures."""
    found: Figures = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def origin(name: str, figures: Figures) -> list[str]:
    """How to make the figures again."""
    versions = ", ".join(f"{package} {version}" for package, version in figures["versions"].items())
    link = f"[{name}.json](../benchmarks/results/{name}.json)"
    used = figures.get("used")  # by what stored it since 0.4
    cost = f" It used {used['cpu']:,.0f} CPU-s, and {used['peak_mb']:,.0f} MB at most in one process." if used else ""
    return [f"`{figures['command']}`, {figures['date']}, {figures['machine']}; {versions} ({link}).{cost}", ""]


def whole_job() -> Iterator[str]:
    """Whole jobs of this and other tools."""
    figures = stored("whole_job")
    yield from origin("whole_job", figures)
    rows = []
    for name, job in figures["jobs"].items():
        middle, runs = job["median"], job["runs"]
        if middle is None:
            rows.append([f"`{name}`", job["tool"], "0", runs[-1]["error"], "", "", "", ""])
            continue
        qualities = [
            f"{q['kl']:.4f} at {q['bits']['quantized_linears']:.2f}"
            for q in job.get("quality", {}).values()
            if "refused" not in q and q["bits"]["quantized_linears"]
        ]
        rows.append(
            [
                f"`{name}`",
                job["tool"],
                str(len(runs)),
                f"{middle['wall']:.0f}",
                f"{middle['cpu']:.0f}",
                f"{job['ratio']['cpu']:.2f}",
                f"{middle['peak'] / 1e9:.2f}",
                ", ".join(qualities) or "not measured",
            ]
        )
    yield from table(
        ["job", "version", "runs", "wall s", "CPU s", "of GPTQ's CPU", "peak GB", "KL at bits a parameter"], rows
    )


def probe() -> Iterator[str]:
    """Probe and cost in units of a plain forward."""
    figures = stored("probe")
    yield from origin("probe", figures)
    yield from table(
        ["type", "plain forward, CPU s", "probe and cost, CPU s", "ratio"],
        [
            [name, f"{of['plain_cpu']:.1f}", f"{of['probe_cpu']:.1f}", f"**{of['ratio']:.2f}**"]
            for name, of in ((name, figures[name]) for name in ("float32", "bfloat16"))
        ],
    )


def roofline() -> Iterator[str]:
    """Stages of the passes and their bounds."""
    figures = stored("roofline")
    yield from origin("roofline", figures)
    for name in ("bfloat16", "float32"):
        of = figures[name]
        rates = ", ".join(f"{of['rates'][key] / 1e9:.0f} G/s in {key}" for key in ("float32", "bfloat16"))
        yield f"{name}; multiply-adds {rates}, copying {of['rates']['bytes'] / 1e9:.1f} GB/s read or written:"
        yield ""
        rows = [
            [
                stage,
                f"{each['seconds']:.1f}",
                f"{each['seconds'] / of['seconds']:.0%}",
                f"{each['bound']:.2f}" if each["limit"] else "",
                f"{each['bound'] / each['seconds']:.0%}" if each["limit"] else "",
                each["limit"],
            ]
            for stage, each in of["stages"].items()
        ]
        whole = [f"{of['seconds']:.1f}", "", f"{of['bound']:.1f}", f"{of['bound'] / of['seconds']:.0%}", ""]
        yield from table(["stage", "CPU s", "share", "bound s", "reached", "bound by"], [*rows, ["all", *whole]])
        yield ""


def rounding() -> Iterator[str]:
    """GPTQ of one Linear beside llm-compressor's, and the scale search beside a loop."""
    figures = stored("rounding")
    yield from origin("rounding", figures)
    rows = []
    for of in figures["gptq"]:
        ours, theirs = of["seconds"]["ours"], of["seconds"]["llm-compressor"]
        rows += [
            [
                str(of["threads"]),
                what,
                f"{ours[f'{key}_wall']:.2f}",
                f"{theirs[f'{key}_wall']:.2f}",
                f"**{of['ratios']['wall'][key]:.2f}**",
            ]
            for what, key in (("Hessian", "calibration"), ("rounding", "rounding"))
        ]
        rows.append([str(of["threads"]), "both", "", "", f"**{of['ratios']['wall']['both']:.2f}**"])
    yield from table(["threads", "step", "ours, s", "llm-compressor, s", "ratio"], rows)
    yield ""
    yield from table(
        ["mean squared output error, held out", "one thread"],
        [[name, f"{error:.5f}"] for name, error in figures["gptq"][0]["error"].items()],
    )


def codecs() -> Iterator[str]:
    """Encoding and decoding in units of a copy."""
    figures = stored("codecs")
    yield from origin("codecs", figures)
    rows = []
    for name, of in figures["ratios"].items():
        cells = [
            f"{of[who][way]['copy']:.1f}" for way in ("encode", "decode") for who in ("ours", "compressed-tensors")
        ]
        rows.append([name, *cells])
    yield from table(["format", "encode", "compressed-tensors' encode", "decode", "compressed-tensors' decode"], rows)


def experts() -> Iterator[str]:
    """A layer of experts in one call."""
    figures = stored("experts")
    yield from origin("experts", figures)
    yield from table(
        ["format", "single calls, ms", "one call, ms", "ratio", "same bits"],
        [
            [
                name,
                f"{of['milliseconds']['single']['all']:.0f}",
                f"{of['milliseconds']['batched']['all']:.0f}",
                f"**{of['ratio']:.2f}**",
                f"{of['same']:.0%}",
            ]
            for name, of in figures["formats"].items()
        ],
    )


def allocator() -> Iterator[str]:
    """The knapsack."""
    figures = stored("allocator")
    yield from origin("allocator", figures)
    yield from table(
        [
            "costs",
            "groups × formats",
            "whole frontier, ms",
            "8 budgets to 1e-6, ms",
            "to the optimum, ms",
            "gap",
            "peak MB",
        ],
        [
            [
                row["instance"],
                f"{row['groups']:,} × {row['formats']}",
                f"{row['frontier'] * 1e3:.1f}",
                f"{row['near'] * 1e3:.0f}",
                f"{row['optimum'] * 1e3:.0f}",
                f"{row['optimum_gap']:.0e}",
                f"{row['peak']:.0f}",
            ]
            for row in figures["rows"]
        ],
    )


def service() -> Iterator[str]:
    """Commands, start and throughput."""
    figures = stored("service")
    yield from origin("service", figures)
    start = figures["start"]
    yield from table(
        ["what", "wall s", "CPU s", "peak MB"],
        [
            *(
                [f"`{name}`", f"{of['wall']:.2f}", f"{of['cpu']:.2f}", f"{of['peak_mb']:.0f}"]
                for name, of in figures["commands"].items()
            ),
            ["start of a local job to its first unit of work", f"{start['first_unit']:.1f}", "", ""],
        ],
    )
    yield ""
    yield from table(
        [f"{figures['throughput']['shipped_gb']} GB", "GB/s", "CPU s", "of copying"],
        [
            [name, f"{of['gb_per_s']:.2f}", f"{of['cpu']:.2f}", f"**{of['of_copying']:.0%}**"]
            for name, of in figures["throughput"].items()
            if name != "shipped_gb"
        ],
    )


def growth() -> Iterator[str]:
    """Slopes on logarithmic axes."""
    figures = stored("growth")
    yield from origin("growth", figures)
    rows = []
    for key, by_figure in figures["slopes"].items():
        steps = " → ".join(str(run[key]) for run in figures["series"][key])
        shown = (by_figure[name] for name in ("wall", "forward", "backward", "cpu", "peak"))
        cells = [" ".join(f"{slope:.2f}" for slope in found) for found in shown]
        rows.append([f"{key} {steps}", *cells])
    yield from table(["from run to run", "whole command", "forward pass", "backward pass", "CPU", "peak memory"], rows)


def at_most(what: str, measured: float, limit: float, shown: str = ".2f") -> list[str]:
    """A row of the targets."""
    return [what, f"≤ {limit:g}", format(measured, shown), "yes" if measured <= limit else "**no**"]


def at_least(what: str, measured: float, limit: float, shown: str = ".2f") -> list[str]:
    """A row of the targets."""
    return [what, f"≥ {limit:g}", format(measured, shown), "yes" if measured >= limit else "**no**"]


def targets() -> Iterator[str]:
    """What was to be reached, and what is."""
    yield from table(["what", "target", "measured", "reached"], [*_targets()])


def _targets() -> Iterator[list[str]]:
    jobs, probes, linear = stored("whole_job")["jobs"], stored("probe"), stored("rounding")
    ratios, served = stored("codecs")["ratios"], stored("service")
    for name in ("bfloat16", "float32"):
        yield at_most(f"whole job in {name}: CPU of llm-compressor's GPTQ", jobs[f"ours-{name}"]["ratio"]["cpu"], 1)
    for name in ("bfloat16", "float32"):
        yield at_most(f"probe and cost in {name}: plain forwards", probes[name]["ratio"], 5)
    for of in linear["gptq"]:
        speed, error = of["ratios"]["wall"], of["error"]
        name = f"GPTQ of 4096 × 4096 on {of['threads']} thread{'s' * (of['threads'] > 1)}"
        yield at_least(f"{name}, after the Hessian: times as fast as llm-compressor", speed["rounding"], 3)
        yield at_least(f"{name}, with the Hessian: times as fast", speed["both"], 3)
        relative = error["ours, scales of the largest weight"] / error["llm-compressor"]
        yield at_most(f"{name}: held-out error of llm-compressor's", relative, 1, ".4f")
    yield at_least("scale search: times as fast as a loop", linear["search"]["ratio_cpu"], 5, ".1f")
    for name, limit in (("MXFP8", 2), ("NVFP4", 4)):
        for way in ("encode", "decode"):
            yield at_most(f"{name} {way}: copies of the BF16 bytes", ratios[name]["ours"][way]["copy"], limit, ".1f")
    faster = (
        of["compressed-tensors"][way]["copy"] / of["ours"][way]["copy"]
        for of in ratios.values()
        for way in ("encode", "decode")
    )
    yield at_least("every codec: times as fast as compressed-tensors' own", min(faster), 1, ".1f")
    solved = [row for row in stored("allocator")["rows"] if row["instance"] != "tight"]
    for groups, formats, limit in ((1_000, 8, 0.2), (30_000, 6, 2)):
        seconds = max(row["frontier"] + row["near"] for row in solved if row["groups"] == groups)
        yield at_most(f"allocator, {groups:,} × {formats}, frontier and eight budgets: s", seconds, limit)
    yield at_most("allocator: proven gap", max(row["near_gap"] for row in solved), 1e-6, ".0e")
    yield at_most("allocator: peak MB", max(row["peak"] for row in solved), 200, ".0f")
    yield at_most("another budget from stored candidates, verified: s", served["commands"]["assemble"]["wall"], 5)
    for name in ("assemble", "verify"):
        yield at_least(f"{name}: share of copying", served["throughput"][name]["of_copying"], 0.7)
    yield at_most("`--help`: s", served["commands"]["help"]["wall"], 0.3)
    yield at_most("start of a local job: s", served["start"]["first_unit"], 12, ".1f")


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "targets": targets,
    "whole job": whole_job,
    "probe": probe,
    "roofline": roofline,
    "rounding": rounding,
    "codecs": codecs,
    "experts": experts,
    "allocator": allocator,
    "service": service,
    "growth": growth,
}


def main() -> None:
    """Write the tables into the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
