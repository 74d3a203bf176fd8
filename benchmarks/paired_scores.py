"""Two models on the same questions of lm-eval: the difference of their scores and its standard error.

    python -m benchmarks.paired_scores SOURCE_SAMPLES.jsonl QUANTIZED_SAMPLES.jsonl [--metric acc]

The files are those that `lm_eval --log_samples` writes for a task. Questions are paired by number, so what makes one
hard for both models cancels: for scores a, b of n questions the standard error is sd(b − a) / √n. Source: Miller,
"Adding Error Bars to Evals" (arXiv 2411.00640), on paired differences.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Mean scores, their difference (quantized − source), its paired and its unpaired standard error, and changes.

    `worse` and `better` count the questions whose score fell and rose.
    """

    questions: int
    source: float
    quantized: float
    difference: float
    error: float
    unpaired_error: float
    worse: int
    better: int


def paired(source: Mapping[int, float], quantized: Mapping[int, float]) -> Paired:
    """The comparison of scores by question; SystemExit unless both have the same questions, at least two."""
    if source.keys() != quantized.keys() or len(source) < 2:
        raise SystemExit(
            f"{len(source)} and {len(quantized)} questions cannot be paired; run both with the same task and limit"
        )
    changes = [quantized[question] - source[question] for question in source]
    root = math.sqrt(len(changes))
    spread = math.hypot(statistics.stdev(source.values()), statistics.stdev(quantized.values()))
    return Paired(
        questions=len(changes),
        source=statistics.fmean(source.values()),
        quantized=statistics.fmean(quantized.values()),
        difference=statistics.fmean(changes),
        error=statistics.stdev(changes) / root,
        unpaired_error=spread / root,
        worse=sum(change < 0 for change in changes),
        better=sum(change > 0 for change in changes),
    )


def scores(path: Path, metric: str) -> dict[int, float]:
    """The score of each question; SystemExit where the samples have no such metric."""
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if any(metric not in sample for sample in samples):
        raise SystemExit(f"{path} has no {metric}; it has {', '.join(samples[0]['metrics'])}")
    return {sample["doc_id"]: float(sample[metric]) for sample in samples}


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--metric", default="acc")
    arguments = parser.parse_args()
    found = paired(scores(arguments.source, arguments.metric), scores(arguments.quantized, arguments.metric))
    print(
        f"{found.questions} questions: {arguments.metric} {found.source:.4f} -> {found.quantized:.4f}, difference "
        f"{found.difference:+.4f} ± {found.error:.4f} paired (± {found.unpaired_error:.4f} unpaired); "
        f"{found.worse} worse, {found.better} better"
    )


if __name__ == "__main__":
    main()
