"""The state of a pass while it is driven: who holds which shard, and where outputs can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actors.schedule.ring import Ring, Step
from actors.schedule.units import Shard

if TYPE_CHECKING:
    from prismaquant_ray.storage.record import Artifact

#: Outputs of a shard that stay in its node's memory until a worker takes the shard that reads them; the rest is read
#: from the run store. A lone worker takes that shard last, and Ray, where a run starts it, has room for twice as much.
WAITING_BYTES = 1 << 28


@dataclass(slots=True, eq=False)
class StepOutput:
    """Where a step's output can be read: from the node of the worker that computed it, or from the run store.

    `unread` are the shards that have not read it yet, `unfinished` those that read it and are not finished.
    """

    unread: set[int]
    unfinished: set[int]
    reference: Any = None
    worker: str = ""
    artifact: Artifact | None = None

    @property
    def where(self) -> Any:
        """What a worker is handed: the reference if there is one, else the artifact or None."""
        return self.reference if self.reference is not None else self.artifact


@dataclass(slots=True, eq=False)
class PassState:
    """The state of one pass; `outputs` are those that a shard which is not finished still reads, or nobody does."""

    shards: Sequence[Shard]
    ring: Ring
    outputs: dict[Step, StepOutput] = field(default_factory=dict)

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> PassState:
        """The state before the first step."""
        return cls(shards, Ring([shard.microbatches for shard in shards], sources_of(shards)))

    def output(self, step: Step) -> StepOutput:
        """Where a step's output is; made when it is first heard of, so memory is for what is in use."""
        if step not in self.outputs:
            readers = self.ring.readers(step)
            self.outputs[step] = StepOutput(unread=readers, unfinished=readers.copy())
        return self.outputs[step]

    def waits_for_too_much(self, shard: int) -> bool:
        """Whether more than `WAITING_BYTES` of a shard's stored outputs are still referenced."""
        waiting = 0
        for microbatch in self.shards[shard].microbatches:
            output = self.outputs.get(Step(shard, microbatch))
            if output is not None and output.artifact is not None and output.reference is not None:
                waiting += output.artifact.size
                if waiting > WAITING_BYTES:
                    return True
        return False


def sources_of(shards: Sequence[Shard]) -> list[dict[int, int]]:
    """For each shard and microbatch, the earlier shard of the pass whose output it reads."""
    ends = {shard.units[-1]: index for index, shard in enumerate(shards)}
    found = []
    for shard in shards:
        before = [ends[origin] for origin in shard.origins if origin in ends]
        takes = set(shard.microbatches)
        found.append({m: index for index in before for m in shards[index].microbatches if m in takes})
    return found
