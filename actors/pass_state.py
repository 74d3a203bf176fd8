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
    """Where a step's output can be read: from the node of the worker that computed it, or from the run store."""

    reference: Any = None
    worker: str = ""
    artifact: Artifact | None = None

    @property
    def where(self) -> Any:
        """What a worker is handed: the reference if there is one, else the artifact or None."""
        return self.reference if self.reference is not None else self.artifact


@dataclass(slots=True, eq=False)
class PassState:
    """The state of one pass.

    `unread[step]` are the shards that have not read the step's output yet; `unfinished[step]` those that read it and
    are not finished.
    """

    shards: Sequence[Shard]
    ring: Ring
    outputs: dict[Step, StepOutput] = field(default_factory=dict)
    unread: dict[Step, set[int]] = field(default_factory=dict)
    unfinished: dict[Step, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for shard, sources in enumerate(self.ring.sources):
            for microbatch, source in sources.items():
                for readers in (self.unread, self.unfinished):
                    readers.setdefault(Step(source, microbatch), set()).add(shard)

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> PassState:
        """The state before the first step."""
        return cls(shards, Ring([shard.microbatches for shard in shards], sources_of(shards)))

    def waiting(self, shard: int) -> int:
        """Bytes of a shard's stored outputs that are still referenced."""
        return sum(
            output.artifact.size
            for step, output in self.outputs.items()
            if step.shard == shard and output.artifact is not None and output.reference is not None
        )


def sources_of(shards: Sequence[Shard]) -> list[dict[int, int]]:
    """For each shard and microbatch, the earlier shard of the pass whose output it reads."""
    ends = {shard.units[-1]: index for index, shard in enumerate(shards)}
    found = []
    for shard in shards:
        before = [ends[origin] for origin in shard.origins if origin in ends]
        takes = set(shard.microbatches)
        found.append({m: index for index in before for m in shards[index].microbatches if m in takes})
    return found
