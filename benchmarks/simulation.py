"""What a pass takes on W equal workers: a simulation of the ring, a closed form, and what both say of many GPUs.

    .venv/bin/python -m benchmarks.simulation

The simulation drives the schedule that runs use (`actors.schedule`) with given durations. The closed form is one line
of arithmetic a shard. The command prints what they give for a 27B model under the assumptions of `GPU` and `MODEL`;
nothing of that was measured on a GPU.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from actors.pass_state import sources_of
from actors.schedule.pass_graph import PassGraph
from actors.schedule.ring import FINISH, Ring, Step
from actors.schedule.run_store import Recorded
from actors.schedule.shards import Work, blocks_per_shard, pending_shards
from actors.schedule.units import PASSES, Exit, Shard, Stage
from jobs.pipeline.cards import CARDS, STORAGE, SUSTAINED_PRODUCTS, SUSTAINED_SINGLE
from prismaquant_ray.attempts import busy_shares
from prismaquant_ray.events import StepDone
from prismaquant_ray.forward.routed_inputs import HESSIANS

_NOTHING = Recorded(done=frozenset(), boundaries=frozenset())


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds of one unit: loading it, one microbatch, and its part of FINISH (encode, or commit)."""

    load: float = 0.0
    microbatch: float = 0.0
    finish: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Durations:
    """Seconds of everything in a run. `forward` and `backward` are of one block of any kind, `entry` also of pixels.

    `hop` passes before a step whose input another worker put out, `call` before every call; a worker is idle in both.
    """

    entry: Cost = Cost()
    forward: Cost = Cost()
    exit: Cost = Cost()
    backward: Cost = Cost()
    hop: float = 0.0
    call: float = 0.0

    def of(self, shard: Shard) -> Cost:
        """Of each unit of a shard."""
        if isinstance(shard.units[0], str):
            return self.entry
        if isinstance(shard.units[0], Exit):
            return self.exit
        return self.forward if shard.stage is Stage.FORWARD else self.backward

    def block(self, stage: Stage) -> Cost:
        """Of a block in a pass."""
        return self.forward if stage is Stage.FORWARD else self.backward


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What a simulated pass took: seconds in all, seconds in calls summed over workers, busy shares, inputs handed on.

    `busy` is that of `busy_shares`: between fill and drain, by worker; empty when a pass is too short for that.
    `busy_in_blocks` is the same without exits: the blocks behind them fill the pipeline when all workers have begun.
    """

    seconds: float
    work: float
    busy: dict[str, float]
    busy_in_blocks: dict[str, float]
    hops: int
    between_workers: int


def first_run(graph: PassGraph, limit: int) -> Work:
    """The shards of a run that has nothing yet."""
    return pending_shards(graph, _NOTHING, _NOTHING, limit=limit)


def whole_run(blocks: int, microbatches: int, limit: int) -> Work:
    """The same of a decoder alone, with nothing before or behind it, on text."""
    return first_run(PassGraph(decoder=blocks, texts=microbatches), limit)


def simulate(shards: Sequence[Shard], durations: Durations, workers: int) -> Pass:
    """A pass on equal workers that are all ready when it begins."""
    simulation = _Simulation(shards, durations, workers)
    while not simulation.ring.finished:
        simulation.turn()
    return Pass(
        seconds=simulation.now,
        work=sum(step.seconds for step in simulation.steps),
        busy=busy_shares(simulation.steps),
        busy_in_blocks=busy_shares([step for step in simulation.steps if not step.shard.startswith("exit")]),
        hops=simulation.hops,
        between_workers=simulation.between_workers,
    )


class _Simulation:
    """The controller's loop over virtual time. Workers that nothing has changed for are not asked again."""

    def __init__(self, shards: Sequence[Shard], durations: Durations, workers: int) -> None:
        self.shards = shards
        self.durations = durations
        self.ring = Ring([shard.microbatches for shard in shards], sources_of(shards))
        self.readers: dict[Step, list[int]] = {}
        for reader, found in enumerate(self.ring.sources):
            for microbatch, source in found.items():
                self.readers.setdefault(Step(source, microbatch), []).append(reader)
        self.steps: list[StepDone] = []
        self.now = 0.0
        self.hops = self.between_workers = 0
        self._ends: list[tuple[float, str, Step | None]] = []
        self._prefetched: dict[str, tuple[int, float]] = {}
        self._holder: dict[int, str] = {}
        self._free = {f"worker-{index:05d}" for index in range(workers)}
        self._waiting: set[str] = set()
        self._heads: set[str] = set()
        self._submit(set())

    def turn(self) -> None:
        """Everything that ends next, then what can begin because of it."""
        self.now = self._ends[0][0]
        woken: set[str] = set()
        while self._ends and self._ends[0][0] == self.now:
            _, worker, step = heapq.heappop(self._ends)
            if step is None:
                self._free.add(worker)
                continue
            self.ring.done(worker, step)
            if step.microbatch == FINISH:
                self._free.add(worker)
                continue
            woken.add(worker)
            holders = {self._holder.get(reader) for reader in self.readers.get(step, ())}
            woken |= {holder for holder in holders if holder in self._waiting}
        self._submit(woken)

    def _submit(self, woken: set[str]) -> None:
        exhausted = False
        for worker in self.ring.order(woken | self._free):
            free = worker in self._free
            self._waiting.discard(worker)
            # The ring answers every worker that holds nothing alike.
            step = None if free and exhausted else self.ring.next(worker)
            if step is not None:
                self._free.discard(worker)
                self._holder[step.shard] = worker
                self._begin(worker, step)
            elif not free:
                self._waiting.add(worker)
            else:
                exhausted = True
                self._begin_to_read(worker)

    def _begin_to_read(self, worker: str) -> None:
        shard = self.ring.prefetch(worker)
        if shard is not None:
            self._free.discard(worker)
            begun = self.now + self.durations.call
            self._read(worker, shard, begun)
            heapq.heappush(self._ends, (begun, worker, None))

    def _read(self, worker: str, shard: int | None, begun: float) -> None:
        """What a thread reads ahead, and until when; only blocks are."""
        self._prefetched.pop(worker, None)
        if shard is not None and isinstance(self.shards[shard].units[0], int):
            cost, units = self.durations.of(self.shards[shard]), len(self.shards[shard].units)
            self._prefetched[worker] = shard, begun + units * cost.load

    def _begin(self, worker: str, step: Step) -> None:
        started = self.now + self.durations.call
        source = self.ring.source(step)
        if source is not None:
            self.hops += 1
            if self._holder[source.shard] != worker:
                self.between_workers += 1
                started += self.durations.hop
        seconds = self._seconds(worker, step, started)
        shard = self.shards[step.shard]
        done = StepDone(
            at=started + seconds,
            stage=shard.stage,
            shard=shard.name,
            units=len(shard.units),
            microbatch=None if step.microbatch == FINISH else step.microbatch,
            worker=worker,
            started=started,
            seconds=seconds,
            peak_bytes=0,
        )
        self.steps.append(done)
        heapq.heappush(self._ends, (started + seconds, worker, step))

    def _seconds(self, worker: str, step: Step, started: float) -> float:
        shard = self.shards[step.shard]
        cost, units = self.durations.of(shard), len(shard.units)
        if step.microbatch == FINISH:
            self._read(worker, self.ring.prefetch(worker), started)
            return units * cost.finish
        load = 0.0
        if isinstance(shard.units[0], Exit):  # the head stays loaded from one exit to the next
            load = 0.0 if worker in self._heads else cost.load
            self._heads.add(worker)
        else:
            self._heads.discard(worker)
            if step.microbatch == shard.microbatches[0]:
                expected, ready = self._prefetched.pop(worker, (None, 0.0))
                load = max(0.0, ready - started) if expected == step.shard else units * cost.load
        return units * cost.microbatch + load


# The closed form --------------------------------------------------------------------------------------------------


def shard_cost(cost: Cost, blocks: int, microbatches: int, *, hop: float, call: float) -> float:
    """c: what a shard of k blocks takes of a worker, M·(k·t + hop + call) + call + k·max(e, load).

    While a shard is finished the one that follows it is read.
    """
    return microbatches * (blocks * cost.microbatch + hop + call) + call + blocks * max(cost.finish, cost.load)


def shard_fill(cost: Cost, blocks: int, *, hop: float, call: float) -> float:
    """f: how long after a shard the one behind it begins, k·t + hop + call."""
    return blocks * cost.microbatch + hop + call


def busy_workers(cost: float, fill: float) -> float:
    """c/f: as many workers as a ring of equal shards can keep busy. With more, W·f is the time of a round."""
    return cost / fill if fill else math.inf


@dataclass(frozen=True, slots=True)
class _Free:
    """When a worker can take its next shard, and since when it reads it."""

    at: float
    reads: float


def predicted(shards: Sequence[Shard], durations: Durations, workers: int) -> float:
    """Closed form of a whole pass over a decoder alone: entry or exits, then one line of arithmetic a shard.

    A shard begins when the one before it has put out its first microbatch, its worker is free, and it is read.
    """
    stage, microbatches = shards[-1].stage, len(shards[-1].microbatches)
    call = durations.call
    hop = durations.hop if workers > 1 else 0.0
    sizes = [len(shard.units) for shard in shards if isinstance(shard.units[0], int)]
    block = durations.block(stage)
    if len(sizes) == len(shards):
        arrives, free = 0.0, [_Free(0.0, call)] * workers
    elif stage is Stage.FORWARD:
        arrives, free = _after_entry(durations, microbatches, workers)
    else:
        arrives, free = _after_exits(durations, microbatches, workers)
    for place, size in enumerate(sizes):
        worker = free[place]
        first_call = max(arrives, worker.at) + call + (hop if len(sizes) < len(shards) or place else 0.0)
        begins = max(first_call, worker.reads + size * block.load)
        arrives = begins + size * block.microbatch
        finishes = arrives + (microbatches - 1) * (size * block.microbatch + hop + call) + call
        free.append(_Free(finishes + size * block.finish, finishes))
    return max(worker.at for worker in free[-len(sizes) :])


def _after_entry(durations: Durations, microbatches: int, workers: int) -> tuple[float, list[_Free]]:
    """When the first block's input is there, and the workers in the order in which they take blocks."""
    entry, call = durations.entry, durations.call
    finishes = entry.load + microbatches * (entry.microbatch + call) + call
    last = _Free(finishes + entry.finish, finishes)
    first = call + entry.load + entry.microbatch if workers > 1 else last.at
    return first, [_Free(0.0, call)] * (workers - 1) + [last]


def _after_exits(durations: Durations, microbatches: int, workers: int) -> tuple[float, list[_Free]]:
    """The same after exits, which workers take in turn."""
    exits, call = durations.exit, durations.call
    one = exits.microbatch + exits.finish + 2 * call
    rounds, rest = divmod(microbatches, workers)
    ends = exits.load + rounds * one if rounds else 0.0
    early = _Free(ends, ends - exits.finish if rounds else call)
    ends = ends + one if rounds else exits.load + one
    late = _Free(ends, ends - exits.finish)
    first = exits.load + exits.microbatch + call
    return first, [early] * (workers - rest) + [late] * rest


# Many GPUs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a worker is assumed to sustain: FLOP/s, bytes/s, and seconds of one kernel launch and of one call."""

    bfloat16: float
    float32: float
    storage: float
    launch: float = 8e-6
    network: float = 3e9
    host: float = 5e9
    call: float = 2e-3


@dataclass(frozen=True, slots=True)
class Matrix:
    """The Linears of a block that read one input, stacked: as one, or of `experts` of which a token has `active`."""

    out: int
    width: int
    experts: int = 1
    active: int = 1

    @property
    def at_once(self) -> int:
        """Chunks that experts are rounded in, as `forward.routed_inputs` cuts them."""
        return math.ceil(self.experts / max(1, HESSIANS // self.width**2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A decoder of equal blocks. `codecs` are bits a weight of each quantized format."""

    blocks: int
    hidden: int
    vocabulary: int
    matrices: tuple[Matrix, ...]
    codecs: tuple[float, ...] = (4.5, 8.25)

    @property
    def parameters(self) -> int:
        """Of a block."""
        return sum(each.out * each.width * each.experts for each in self.matrices)

    @property
    def active(self) -> int:
        """Weights of a block that a token is multiplied by."""
        return sum(each.out * each.width * each.active for each in self.matrices)

    @property
    def candidate_bytes(self) -> float:
        """Of a block, every format."""
        return self.parameters * sum(self.codecs) / 8

    @property
    def launches(self) -> int:
        """Kernels that encode a block: tests/device/test_costs.py counts 945 for four matrices in two formats."""
        return 120 * len(self.codecs) * sum(each.at_once for each in self.matrices)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What is run through the model."""

    sequences: int = 256
    length: int = 1024
    microbatch: int = 4

    @property
    def microbatches(self) -> int:
        """How many there are."""
        return math.ceil(self.sequences / self.microbatch)

    def hop_bytes(self, model: Model) -> int:
        """BF16 hidden states of a microbatch."""
        return self.microbatch * self.length * model.hidden * 2


#: An H100 and a B200 as `inspect --for` takes them; of storage, network and host the same.
MACHINES = {
    name: Machine(
        bfloat16=SUSTAINED_PRODUCTS * CARDS[name].products,
        float32=SUSTAINED_SINGLE * CARDS[name].single,
        storage=STORAGE,
    )
    for name in ("H100", "B200")
}
GPU = MACHINES["H100"]
#: Widths of Qwen3-8B, Qwen3.6-27B, Qwen3.6-35B-A3B and Qwen3.5-122B-A10B; hybrid attention as its linear blocks.
MODELS = {
    "8B": Model(
        blocks=36,
        hidden=4096,
        vocabulary=151_936,
        matrices=(Matrix(6144, 4096), Matrix(4096, 4096), Matrix(24_576, 4096), Matrix(4096, 12_288)),
    ),
    "27B": Model(
        blocks=64,
        hidden=5120,
        vocabulary=248_320,
        matrices=(Matrix(14_336, 5120), Matrix(5120, 6144), Matrix(34_816, 5120), Matrix(5120, 17_408)),
    ),
    "35B-A3B": Model(
        blocks=40,
        hidden=2048,
        vocabulary=248_320,
        matrices=(
            Matrix(12_288, 2048),
            Matrix(2048, 4096),
            Matrix(1024, 2048, 256, 8),
            Matrix(2048, 512, 256, 8),
            Matrix(1024, 2048),
            Matrix(2048, 512),
        ),
    ),
    "122B-A10B": Model(
        blocks=48,
        hidden=3072,
        vocabulary=248_320,
        matrices=(
            Matrix(20_480, 3072),
            Matrix(3072, 8192),
            Matrix(2048, 3072, 256, 8),
            Matrix(3072, 1024, 256, 8),
            Matrix(2048, 3072),
            Matrix(3072, 1024),
        ),
    ),
}
MODEL = MODELS["27B"]
# Kernels of a microbatch in a block: what tests/device/test_costs.py counts of a block of experts in bfloat16.
_FORWARD, _BACKWARD = 189, 363


def durations_of(model: Model, machine: Machine, calibration: Calibration) -> Durations:
    """Floating-point operations, launches and bytes over what the machine sustains.

    Attention scores and element-wise work are left out. Products have BF16 factors; GPTQ and its acceptance, which have
    not, count as float32. The host launches while the device computes: the slower one counts.
    """
    tokens = calibration.microbatch * calibration.length
    product = 2 * tokens * model.active / machine.bfloat16
    copies = 3 * calibration.hop_bytes(model) / machine.host
    # Of experts also that of all together.
    rows = sum((2 * each.active if each.experts > 1 else 1) * each.width**2 for each in model.matrices)
    hessians = 2 * tokens * rows / machine.bfloat16
    # Judging three attempts, errors pushed on, and a factorization of each Hessian.
    codecs = len(model.codecs)
    encoding = sum(
        each.experts * ((2 * 3 + 1) * codecs * each.out * each.width**2 + each.width**3) for each in model.matrices
    )
    weights = 2 * model.parameters
    head = model.vocabulary * model.hidden
    return Durations(
        entry=Cost(load=2 * head / machine.storage, microbatch=copies),
        forward=Cost(
            load=weights / machine.storage,
            microbatch=max(product + hessians, _FORWARD * machine.launch) + copies,
            finish=max(encoding / machine.float32, model.launches * machine.launch)
            + model.candidate_bytes / machine.storage,
        ),
        exit=Cost(load=2 * head / machine.storage, microbatch=4 * tokens * head / machine.bfloat16 + 2 * copies),
        backward=Cost(
            load=(weights + model.candidate_bytes) / machine.storage,
            microbatch=max((3 + codecs) * product, _BACKWARD * machine.launch) + copies,
        ),
        hop=calibration.hop_bytes(model) / machine.network,
        call=machine.call,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """A whole run on some GPUs. `busy` is the smallest share of a worker in each pass's blocks, between fill and drain.

    It is None where drain begins before the last worker has a block.
    `efficiency` is one worker's time over W times this one; `limits` are c/f of both passes; bytes are of the run.
    """

    gpus: int
    workers: int
    blocks: int
    forward: float
    backward: float
    closed: float
    single: float
    busy: tuple[float | None, ...]
    limits: tuple[float, ...]
    hop_bytes: float
    storage_bytes: float

    @property
    def seconds(self) -> float:
        """Both passes."""
        return self.forward + self.backward

    @property
    def speedup(self) -> float:
        """Over one GPU."""
        return self.single / self.seconds

    @property
    def efficiency(self) -> float:
        """Of the workers that the run takes."""
        return self.speedup / self.workers

    @property
    def limit(self) -> str:
        """What keeps more GPUs from helping."""
        if self.gpus > self.workers:
            return f"{self.gpus - self.workers} GPUs are not asked for"
        if self.workers > min(self.limits):
            return f"c/f = {min(self.limits):.0f}"
        return "fill and drain" if self.efficiency < 0.95 else "nothing"


def outlook(
    gpus: int,
    *,
    model: Model = MODEL,
    machine: Machine = GPU,
    calibration: Calibration = Calibration(),
    limit: int | None = None,
    at_most: int | None = None,
) -> Outlook:
    """Simulated: `limit` blocks a shard (what a run chooses when None), never more than `at_most` workers.

    By default no more than a run asks for: one a microbatch, one a block and the entry.
    """
    microbatches = calibration.microbatches
    workers = min(gpus, at_most if at_most is not None else min(microbatches, model.blocks + 1))
    if limit is None:
        limit = blocks_per_shard(blocks=model.blocks, workers=workers, fitting=model.blocks)
    durations = durations_of(model, machine, calibration)
    work = whole_run(model.blocks, microbatches, limit)
    passes = {stage: simulate(work.of(stage), durations, workers) for stage in PASSES}
    once = whole_run(model.blocks, microbatches, blocks_per_shard(blocks=model.blocks, workers=1, fitting=model.blocks))
    block_shards = sum(isinstance(shard.units[0], int) for shard in work.forward)
    everything = microbatches * calibration.hop_bytes(model)
    return Outlook(
        gpus=gpus,
        workers=workers,
        blocks=limit,
        forward=passes[Stage.FORWARD].seconds,
        backward=passes[Stage.BACKWARD].seconds,
        closed=sum(predicted(work.of(stage), durations, workers) for stage in PASSES),
        single=sum(predicted(once.of(stage), durations, 1) for stage in PASSES),
        busy=tuple(
            min(one.busy_in_blocks.values()) if len(one.busy_in_blocks) == workers else None for one in passes.values()
        ),
        limits=tuple(_limit(durations, stage, microbatches, limit) for stage in PASSES),
        hop_bytes=sum(one.hops for one in passes.values()) * calibration.hop_bytes(model),
        # Weights twice, candidates written and read, each boundary written and the forward ones read again.
        storage_bytes=model.blocks * (4 * model.parameters + 2 * model.candidate_bytes)
        + everything * (3 * block_shards + 3),
    )


def _limit(durations: Durations, stage: Stage, microbatches: int, blocks: int) -> float:
    hop, call, block = durations.hop, durations.call, durations.block(stage)
    return busy_workers(
        shard_cost(block, blocks, microbatches, hop=hop, call=call), shard_fill(block, blocks, hop=hop, call=call)
    )


def block_row(durations: Durations, stage: Stage, label: str) -> str:
    """A line of the table of one block."""
    block, microbatches = durations.block(stage), Calibration().microbatches
    cost = shard_cost(block, 1, microbatches, hop=durations.hop, call=durations.call)
    fill = shard_fill(block, 1, hop=durations.hop, call=durations.call)
    return (
        f"| {label} | {block.load:.2f} | {block.microbatch:.3f} | {block.finish:.1f} | {cost:.1f} | {fill:.2f} "
        f"| {cost / fill:.0f} |"
    )


def row(found: Outlook, label: str) -> str:
    """A line of the table."""
    busy = ", ".join("–" if share is None else f"{share:.0%}" for share in found.busy)
    return (
        f"| {label} | {found.workers} | {found.blocks} | {found.forward / 60:.1f} | {found.backward / 60:.1f} "
        f"| {found.closed / 60:.1f} | {found.speedup:.1f} | {found.efficiency:.0%} | {busy} "
        f"| {found.hop_bytes / 1e9:,.0f} | {found.storage_bytes / 1e9:,.0f} | {found.limit} |"
    )


def stages_row(name: str, card: str) -> str:
    """Seconds of a block on one GPU by what takes them, minutes of both passes on 1, 8 and 64, the largest part."""
    model, machine, calibration = MODELS[name], MACHINES[card], Calibration()
    durations = durations_of(model, machine, calibration)
    storing = model.candidate_bytes / machine.storage
    parts = {
        "loading": durations.forward.load + durations.backward.load,
        "forward": calibration.microbatches * durations.forward.microbatch,
        "rounding": durations.forward.finish - storing,
        "storing": storing,
        "backward": calibration.microbatches * durations.backward.microbatch,
    }
    minutes = (f"{outlook(gpus, model=model, machine=machine).seconds / 60:.1f}" for gpus in (1, 8, 64))
    cells = [*(f"{part:.1f}" for part in parts.values()), *minutes, max(parts, key=lambda part: parts[part])]
    return f"| {name} on {card} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the tables of docs/scaling.md that are computed."""
    print("seconds of one block, 256 × 1024 tokens\n")
    heads = ["model", "loading", "forward", "rounding", "storing", "backward", "1", "8", "64", "most"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for card in MACHINES:
        for name in MODELS:
            print(stages_row(name, card))
    print("seconds of one block, microbatches of 4 × 1024 tokens\n")
    print("| pass | load | microbatch | encode or commit | c, k = 1 | f, k = 1 | c/f |\n|---|---|---|---|---|---|---|")
    durations = durations_of(MODEL, GPU, Calibration())
    print(block_row(durations, Stage.FORWARD, "forward"))
    print(block_row(durations, Stage.BACKWARD, "backward"))
    print(f"hop {durations.hop:.3f} s, exit {durations.exit.microbatch:.3f} s a microbatch\n")
    print(
        "| GPUs | workers | blocks a shard | forward min | backward min | closed form min "
        "| speed-up | efficiency | busy at least | GB hopped | GB read and written | limited by |"
    )
    print("|" + "---|" * 12)
    for gpus in (1, 8, 16, 64, 256):
        print(row(outlook(gpus), str(gpus)))
    for label, found in variants():
        print(row(found, label))


def variants() -> list[tuple[str, Outlook]]:
    """What changes when something else is chosen."""
    return [
        ("8, microbatch 1", outlook(8, calibration=Calibration(microbatch=1))),
        ("64, microbatch 1", outlook(64, calibration=Calibration(microbatch=1))),
        ("64, microbatch 1, 1,024 sequences", outlook(64, calibration=Calibration(sequences=1024, microbatch=1))),
        ("64, 2 blocks a shard", outlook(64, limit=2)),
        ("64, 4 GB/s of storage", outlook(64, machine=replace(GPU, storage=4e9))),
        ("64, microbatch 16", outlook(64, calibration=Calibration(microbatch=16))),
        ("64, microbatch 16, all asked for", outlook(64, calibration=Calibration(microbatch=16), at_most=65)),
    ]


if __name__ == "__main__":
    main()
