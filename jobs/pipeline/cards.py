"""GPUs that nobody has here, to plan for: by name, from a table of what they are said to do, or by memory alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

from actors.diagnosis import Rates
from actors.memory import planned_of
from actors.memory_plan import Free
from prismaquant_ray.errors import InputError
from prismaquant_ray.gpus import GPUS, GpuName
from prismaquant_ray.settings.values import parse_bytes

_MACHINES = re.compile(r"(\d+)x(.+)")
# Shares of a card's figures that a job is taken to sustain, and what storage, a network and digests are taken to do, in
# bytes/s. Assumptions: none of these cards was measured.
SUSTAINED_PRODUCTS, SUSTAINED_SINGLE = 0.4, 0.6
STORAGE = 1e9
DIGEST = 1.5e9
COPIES = 2.5e10
# GPTQ's columns and the judging of its result: see `encoding`. Width of a matrix that is taken for all.
_WIDTH, _PRODUCTS_A_CODEC = 4096, 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU as its maker describes it: bytes of memory, dense products of BF16 and float32 arithmetic in FLOP/s.

    A `unified` one has the memory of its CPU and no other.
    """

    memory: int
    products: float
    single: float
    unified: bool = False

    @property
    def free(self) -> Free:
        """What a worker may take; the host's memory is not known."""
        return Free(memory=planned_of(self.memory), host=None if self.unified else _UNKNOWN, gpu=True)

    def rates(self, codecs: int) -> Rates:
        """What a worker is taken to do, with so many codecs to encode in."""
        # By weight and codec the errors of three attempts under a Hessian and those that are pushed on, 2·7·I/2 FLOP;
        # the factorization of the Hessian counts as one more.
        encoding = SUSTAINED_SINGLE * self.single / ((_PRODUCTS_A_CODEC * codecs + 1) * _WIDTH)
        return Rates(
            products=SUSTAINED_PRODUCTS * self.products,
            encoding=encoding,
            to_device=COPIES,
            to_host=COPIES,
            digest=DIGEST,
            write=STORAGE,
            read=STORAGE,
        )


# More than any host has: what it has is not known, what it needs is said.
_UNKNOWN = 1 << 62
_GB, _TFLOP = 10**9, 1e12


def _bf16(name: GpuName) -> float:
    """Dense products of BF16, in FLOP/s."""
    return float(GPUS[name].rate(16))


#: By name. Source: NVIDIA's data sheets.
CARDS: dict[str, Card] = {
    "A100": Card(memory=80 * _GB, products=_bf16(GpuName.A100), single=19.5 * _TFLOP),
    "L4": Card(memory=24 * _GB, products=_bf16(GpuName.L4), single=30.3 * _TFLOP),
    "L40S": Card(memory=48 * _GB, products=_bf16(GpuName.L40S), single=91.6 * _TFLOP),
    "RTX4090": Card(memory=24 * _GB, products=_bf16(GpuName.RTX4090), single=82.6 * _TFLOP),
    "RTX5090": Card(memory=32 * _GB, products=_bf16(GpuName.RTX5090), single=105 * _TFLOP),
    "H100": Card(memory=80 * _GB, products=_bf16(GpuName.H100), single=67 * _TFLOP),
    "H200": Card(memory=141 * _GB, products=_bf16(GpuName.H200), single=67 * _TFLOP),
    "B200": Card(memory=180 * _GB, products=_bf16(GpuName.B200), single=75 * _TFLOP),
    "GB10": Card(memory=128 * _GB, products=_bf16(GpuName.GB10), single=31 * _TFLOP, unified=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """`workers` equal GPUs as `text` names them: what a worker may take, and the card, if it is one of the table."""

    text: str
    workers: int
    free: Free
    card: Card | None

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """Of 8xH100 or 8x80GB; InputError for anything else."""
        found = _MACHINES.fullmatch(text)
        count, what = (int(found[1]), found[2]) if found else (0, "")
        names = {name.lower(): card for name, card in CARDS.items()}
        card = names.get(what.lower().replace("-", "").replace(" ", ""))
        try:
            memory = 0 if card is not None or count < 1 else parse_bytes(what)
        except ValueError as error:
            raise InputError(f"--for {text}: {error}, or one of the cards {', '.join(CARDS)}") from error
        if count < 1 or (card is None and memory < 1):
            raise InputError(
                f"--for {text}: write how many GPUs of which kind or memory, e.g. 8xH100 or 8x80GB; cards with known "
                f"rates are {', '.join(CARDS)}"
            )
        free = card.free if card is not None else Free(memory=planned_of(memory), host=_UNKNOWN, gpu=True)
        return cls(text=text, workers=count, free=free, card=card)
