"""Formatting of figures for people: significant digits, units and standard errors."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prismaquant_ray.records import PlanTimes, ServerMemory

#: Placeholder for a missing figure.
NONE = "–"
# No-break space between a figure and its unit.
_GAP = "\u00a0"


def figure(value: float | None, digits: int = 4) -> str:
    """A figure with `digits` significant digits, without an exponent from 1e-5 on."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if abs(value) < 1e-5:
        return _signed(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _signed(f"{value:,.{decimals}f}")


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _decimals(error: float) -> int:
    """Decimals for a standard error, by the Particle Data Group's rule: two digits up to 35, else one."""
    exponent = math.floor(math.log10(error))
    return (0 if error / 10**exponent >= 3.55 else 1) - exponent


def value(figure_: float | None, error: float | None) -> str:
    """A figure rounded to the precision of its standard error."""
    if figure_ is None or not error:
        return figure(figure_)
    decimals = _decimals(error)
    return _signed(f"{figure_:.1e}" if decimals > 7 else f"{figure_:,.{max(0, decimals)}f}")


def with_error(figure_: float | None, error: float | None) -> str:
    """A figure with its standard error: 0.1122 ± 0.0007, 0.2246 ± 0.0016."""
    return value(figure_, error) if figure_ is None or not error else f"{value(figure_, error)} ± {value(error, error)}"


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return NONE
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            # 19.4 GB and 133.5 MB, but 1.34 GB.
            return f"{count / scale:,.{2 if count < 10 * scale else 1}f}{_GAP}{unit}"
    return f"{count:,.0f}{_GAP}B"


def gigabytes(count: int) -> str:
    """Bytes as 0.14 GB, for amounts that people add up or compare."""
    return f"{count / 1e9:.2f} GB"


def memory(count: int) -> str:
    """Bytes as 19.00 GB, and 133.5 MB below one."""
    return gigabytes(count) if count >= 10**9 else f"{count / 1e6:.1f} MB"


def server_memory(found: ServerMemory) -> str:
    """A server's memory and its parts, in one line."""
    unit, name = (1e9, "GB") if found.total >= 10**9 else (1e6, "MB")
    kinds = " + ".join(f"{kind.replace('_', ' ')} {size / unit:.2f}" for kind, size in found.kv_cache_of.items())
    return (
        f"{found.total / unit:.2f} {name} = weights {found.weights / unit:.2f} + KV cache "
        f"{found.kv_cache / unit:.2f} ({kinds}; {found.sequences} × {found.context} tokens) + margin "
        f"{found.margin / unit:.2f}"
    )


def plan_times(found: PlanTimes) -> str:
    """A plan's times, in one line."""
    return f"prefill {found.prefill:.3f}, decode {found.decode:.3f} of {times_basis(found)}"


def times_basis(found: PlanTimes) -> str:
    """What a plan's times are relative to, and the limits on them."""
    given = (("prefill", found.prefill_limit), ("decode", found.decode_limit))
    limits = ", ".join(f"{name} {most:g}" for name, most in given if most is not None)
    return f"the fastest plan's time, by the roofline of {found.gpu}" + (f"; limits: {limits}" if limits else "")


def amount(count: float | None) -> str:
    """A count of parameters or tokens: 106.2 M."""
    if count is None:
        return NONE
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if count >= scale:
            return f"{count / (1e3 if unit == 'k' else scale):,.1f}{_GAP}{unit}"
    return f"{count:,.0f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as 42.0 %."""
    return NONE if share is None else f"{100 * share:.{digits}f}{_GAP}%"


def seconds(value: float | None) -> str:
    """A span of time: 3 min 46 s."""
    if value is None:
        return NONE
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def verified(*, named_by: str | None) -> str:
    """What a check without problems has shown; `named_by` is the runtime whose own names are known."""
    return "verified" if named_by is not None else "verified, but for serving names: no server's are known"


def target(name: str) -> str:
    """A plan's target: 5.5 bpp, 19.0 GB, 24.0 GB of VRAM (1 x 32768 tokens)."""
    found = re.fullmatch(r"([0-9.]+)bpp|(\d+)B(?:-vram-(\d+)x(\d+))?", name)
    if found is None:
        return name
    if found[1]:
        return f"{found[1]}{_GAP}bpp"
    return size(int(found[2])) + (f" of VRAM ({found[3]} x {found[4]} tokens)" if found[3] else "")


def change(share: float) -> str:
    """A relative difference: +22.1 %, −50.0 %, the same."""
    return "the same" if abs(share) < 0.0005 else _signed(f"{100 * share:+.1f}{_GAP}%")


def shrunk(before: float, after: float) -> str:
    """Two sizes, the unit once when it is the same: 269.0 → 133.5 MB."""
    first, second = size(before), size(after)
    number, _, unit = first.partition(_GAP)
    return f"{number} → {second}" if second.endswith(f"{_GAP}{unit}") else f"{first} → {second}"
