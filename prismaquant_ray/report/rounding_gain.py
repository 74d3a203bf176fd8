"""Gain of rounding over round-to-nearest: ratios of output errors on held-out calibration sequences."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

from prismaquant_ray.block_records import LinearRounding, Method
from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.report.group_findings import CodecGain, Gain, LinearGain, RoundingFindings
from prismaquant_ray.report.groups import inside
from prismaquant_ray.report.run_data import RunData

#: Of one matrix: the winning method, and the held-out error of every method.
Matrix = tuple[Method, dict[Method, float]]
# Lower bound of ratios, so that an error of 0 has a logarithm.
_LEAST = 1e-12


def geometric_mean(ratios: Sequence[float]) -> float:
    """exp(Σ log r / n), of ratios above zero."""
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def rounding(data: RunData) -> RoundingFindings:
    """The gain of every Linear, and of all matrices by codec."""
    users: dict[str, list[str]] = {}
    for name in data.config.formats:
        codec = FORMATS[name].codec
        if codec is not None:
            users.setdefault(codec.name, []).append(str(name))
    linears: list[LinearGain] = []
    every: dict[str, list[Matrix]] = {name: [] for name in codecs_of(data.config.formats)}
    for block in data.layout.blocks:
        figures = data.forward[block.index].linears
        for linear in block.linears:
            # None of a Linear whose shape no codec takes.
            for codec_name, found in figures.get(linear.name, {}).items():
                matrices = list(found.matrices())
                every[codec_name] += matrices
                linears.append(
                    LinearGain(
                        linear=linear.name,
                        block=block.index,
                        module=inside(linear.name, block),
                        codec=codec_name,
                        experts=linear.experts,
                        **asdict(_gain(matrices, statistics.median)),
                    )
                )
    codecs = {
        name: CodecGain(formats=users[name], matrices=len(matrices), **asdict(_gain(matrices, geometric_mean)))
        for name, matrices in every.items()
    }
    return RoundingFindings(codecs=codecs, linears=linears)


def gain_of(roundings: Iterable[LinearRounding]) -> Gain:
    """The joint gain of some Linears, as geometric means over their matrices."""
    return _gain([matrix for found in roundings for matrix in found.matrices()], geometric_mean)


def _gain(matrices: Sequence[Matrix], middle: Callable[[Sequence[float]], float]) -> Gain:
    ratios: dict[str, list[float]] = {}
    shipped = []
    for method, errors in matrices:
        nearest = errors["nearest"]
        if nearest <= 0:
            continue
        for name, error in errors.items():
            if name != "nearest":
                ratios.setdefault(name, []).append(max(error / nearest, _LEAST))
        shipped.append(max(errors[method] / nearest, _LEAST))
    deciles = statistics.quantiles(shipped, n=10) if len(matrices) > 1 and len(shipped) > 1 else None
    return Gain(
        ratio={name: middle(values) for name, values in ratios.items()},
        shipped=middle(shipped) if shipped else None,
        low=deciles[0] if deciles else None,
        high=deciles[-1] if deciles else None,
        won=dict(Counter(method for method, _ in matrices)),
        judged=len(shipped),
    )


def roundings(data: RunData, name: FormatName, linears: Iterable[str]) -> list[LinearRounding]:
    """Rounding records of some Linears for the codec of a format."""
    codec = FORMATS[name].codec
    assert codec is not None
    found = {linear: figures for record in data.forward.values() for linear, figures in record.linears.items()}
    return [found[linear][codec.name] for linear in linears]
