"""The units of every pass and their dependencies: all that planning needs to know of a model.

Forward:    pixels → vision blocks → merger → entry → decoder blocks → draft, head
Backward:   exits → decoder blocks → merger → vision blocks; draft and head by themselves, each with its own loss
Evaluation: pixels → vision blocks → merger → entry → decoder blocks → draft, exits

Images run through every unit, text enters at the entry. Parts in parentheses below are optional.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from actors.schedule.units import Exit, Stage, Unit
from prismaquant_ray.layout import BlockKind, Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class PassGraph:
    """Blocks in order: `vision` ones (the merger is the last), `decoder` ones, (a draft), (a head).

    `mixtures` are the decoder blocks with experts, by index. Microbatches in order: `texts` of text, then `images`.
    """

    decoder: int
    texts: int
    vision: int = 0
    images: int = 0
    draft: bool = False
    head: bool = False
    mixtures: frozenset[int] = frozenset()

    @classmethod
    def of(cls, layout: Layout, *, texts: int, images: int) -> PassGraph:
        """The graph of a model."""
        return cls(
            decoder=len(layout.of(BlockKind.DECODER)),
            texts=texts,
            vision=len(layout.of(BlockKind.VISION, BlockKind.MERGER)),
            images=images,
            draft=bool(layout.of(BlockKind.DRAFT)),
            head=bool(layout.of(BlockKind.HEAD)),
            mixtures=frozenset(
                block.index
                for block in layout.of(BlockKind.DECODER)
                if any(group.experts is not None for group in block.groups)
            ),
        )

    @property
    def blocks(self) -> int:
        """Blocks of every kind."""
        return self.vision + self.decoder + self.draft + self.head

    @property
    def first(self) -> int:
        """The first decoder block."""
        return self.vision

    @property
    def last(self) -> int:
        """The last decoder block."""
        return self.vision + self.decoder - 1

    @property
    def heads(self) -> tuple[int, ...]:
        """Draft and head: they read the output of the last decoder block, and nothing reads theirs."""
        return tuple(range(self.last + 1, self.blocks))

    @property
    def every(self) -> tuple[int, ...]:
        """Every microbatch."""
        return tuple(range(self.texts + self.images))

    @property
    def exits(self) -> tuple[Exit, ...]:
        """The exit for every microbatch."""
        return tuple(Exit(microbatch) for microbatch in self.every)

    def order(self, stage: Stage) -> list[Unit]:
        """The units of a pass, each behind the units it reads; without the exits that a backward pass begins with."""
        if stage is Stage.BACKWARD:
            return [*range(self.last, -1, -1), *self.heads]
        tower: list[Unit] = ["pixels", *range(self.vision)] if self.vision and self._sees(stage) else []
        if stage is Stage.FORWARD:
            return [*tower, "entry", *range(self.first, self.blocks)]
        return [*tower, "entry", *range(self.first, self.last + 1 + self.draft), *self.exits]

    def _sees(self, stage: Stage) -> bool:
        """Whether a pass runs the tower: an evaluation without images has nothing for it."""
        return self.images > 0 or stage is Stage.FORWARD

    def products(self, stage: Stage) -> set[Unit]:
        """The units of a pass that leave a record."""
        if stage is Stage.EVALUATION:
            return {*self.exits, *self.heads[: self.draft], *self.mixtures}
        return set(range(self.blocks))

    def reads(self, stage: Stage, unit: Unit) -> tuple[Unit, ...]:
        """The units whose output is the input of a unit."""
        if isinstance(unit, Exit):
            return (self.last,) if stage is Stage.EVALUATION else ()
        if unit == "pixels":
            return ()
        if unit == "entry":
            return (self.vision - 1,) if self.vision and self._sees(stage) else ()
        if stage is not Stage.BACKWARD:
            return (self.below(unit),)
        if unit in self.heads:
            return ()
        return self.exits if unit == self.last else (unit + 1,)

    def below(self, unit: Unit) -> Unit:
        """The unit whose forward output a block recomputes from."""
        assert isinstance(unit, int)
        if unit in self.heads:
            return self.last
        if unit == self.first:
            return "entry"
        return "pixels" if unit == 0 else unit - 1

    def reader(self, unit: Unit) -> Unit | None:
        """The block that reads a unit's gradient; None when there is none."""
        if isinstance(unit, Exit):
            return self.last
        return unit - 1 if isinstance(unit, int) and unit > 0 and unit not in self.heads else None

    def microbatches(self, unit: Unit) -> tuple[int, ...]:
        """The microbatches a unit takes: images for the vision tower, text for a draft head, all for the rest."""
        if isinstance(unit, Exit):
            return (unit.microbatch,)
        if unit == "pixels" or (isinstance(unit, int) and unit < self.first):
            return self.every[self.texts :]
        if self.draft and unit == self.last + 1:
            return self.every[: self.texts]
        return self.every

    def has_image(self, microbatch: int) -> bool:
        """Whether a microbatch is of images."""
        return microbatch >= self.texts

    def joined(self, first: Unit, second: Unit) -> bool:
        """Whether two neighbours of a pass may be in one shard."""
        if not (isinstance(first, int) and isinstance(second, int)) or {first, second} & {*self.heads}:
            return False
        return (first < self.first) == (second < self.first)

    def readers_of_last(self) -> Iterable[Unit]:
        """The units of the backward pass that read the output of the last decoder block."""
        return (self.last, *self.exits, *self.heads)
