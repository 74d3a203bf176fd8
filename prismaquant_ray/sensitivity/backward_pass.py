"""One block of the backward pass: recompute it, take output gradients, price every candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from prismaquant_ray.calibration.batches import Batch
from prismaquant_ray.checkpoint.decoded_candidates import CandidateTensors
from prismaquant_ray.errors import InputError
from prismaquant_ray.finite import all_finite
from prismaquant_ray.formats import FormatName
from prismaquant_ray.layout import Block, Kind
from prismaquant_ray.models.draft import most_likely
from prismaquant_ray.models.runner import ModelRunner
from prismaquant_ray.models.taps import Taps, tapped
from prismaquant_ray.sensitivity.fisher import DRAFT, Loss
from prismaquant_ray.sensitivity.pricing import BlockSensitivity, Passed, Pricing


class BackwardVisit:
    """A block while it is loaded for the backward pass.

    Microbatches must come in order, `forward` then `backward` for each, then `finish`. Without formats it only passes
    gradients on, and there is nothing to finish.
    """

    def __init__(
        self, runner: ModelRunner, index: int, formats: Sequence[FormatName], candidates: CandidateTensors
    ) -> None:
        self.runner = runner
        self.block: Block = runner.layout.blocks[index]
        self.module = runner.load_block(index)
        self.formats = tuple(formats)
        self._graph: tuple[Tensor, Tensor, Taps] | None = None
        self.pricing = Pricing(self.block, self.module, formats, candidates, runner.device)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """What leaves the block for hidden (sequences, tokens, H); its graph is held until `backward`."""
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad(), tapped(self.module, self.block) as taps:
            output = self.runner.run_block(self.block.index, self.module, hidden, batch.inputs)
        self._graph = hidden, output, taps
        return output.detach()

    def backward(self, grad_output: Tensor, batch: Batch) -> Tensor:
        """∂L/∂hidden for ∂L/∂output, both (sequences, tokens, H); prices every candidate on the way.

        The merger takes the gradient of all that enters the decoder: its own are the positions that stand for images.
        """
        assert self._graph is not None, "forward comes first"
        (hidden, output, taps), self._graph = self._graph, None
        if self.block.kind is Kind.MERGER:
            grad_output = grad_output[batch.tokens.to(grad_output.device) == self.runner.layout.image_token]
        return self._price(output, grad_output, taps, len(batch.tokens), hidden)

    def finish(self, tokens: int) -> BlockSensitivity:
        """Prices per token of `tokens`; InputError when no gradient reached the block."""
        return self.pricing.finish(tokens)

    def _price(self, output: Tensor, grad_output: Tensor, taps: Taps, sequences: int, hidden: Tensor) -> Tensor:
        """∂L/∂hidden; what is differentiated on the way prices every candidate."""
        parameters = list(taps.outputs)
        watched = [taps.entries[name] for name in parameters] + [taps.outputs[name] for name in parameters]
        gradient, *inside = torch.autograd.grad(output, [hidden, *watched], grad_output)
        sound = all_finite(gradient)
        if self.formats:
            at_inputs, at_outputs = inside[: len(parameters)], inside[len(parameters) :]
            with torch.no_grad():
                passed = dict(zip(parameters, map(Passed, at_inputs, at_outputs), strict=True))
                # A gradient that is no number makes a price that is none.
                sound = self.pricing.add(taps, passed, sequences) and sound
        if not sound:
            name = self.block.prefix or self.block.groups[0].name
            raise InputError(f"{name} has NaN or infinite gradients; is the checkpoint intact?")
        return gradient


class LeafVisit(BackwardVisit):
    """A draft head or an output head: it has a loss of its own, and passes no gradient on.

    Call `run` for each microbatch inside the runner's `beside`, then `finish`.
    """

    def __init__(
        self, runner: ModelRunner, index: int, formats: Sequence[FormatName], candidates: CandidateTensors, loss: Loss
    ) -> None:
        super().__init__(runner, index, formats, candidates)
        self.loss = loss
        self.tokens = 0
        #: Positions where the draft guessed what the model says, by the format of the whole draft head.
        self.agreed: dict[str, int] = {}

    def run(self, hidden: Tensor, batch: Batch) -> None:
        """Price a microbatch, for what left the last decoder layer (sequences, tokens, H)."""
        if self.block.kind is Kind.DRAFT:
            drafted = self.forward(hidden, batch)
            gradient, _ = self.loss.gradient(self.runner.draft_logits, drafted, batch, stream=DRAFT)
            self.backward(gradient, batch)
            self.tokens += drafted.shape[0] * drafted.shape[1]
            self._agreement(hidden, drafted, batch)
            return
        for row, where, loss in self.loss.pieces(hidden.shape[1], batch):
            piece = hidden[row : row + 1, where].detach().requires_grad_()
            with torch.enable_grad(), tapped(self.module, self.block) as taps:
                logits = self.runner.run_block(self.block.index, self.module, piece, batch.inputs)
            at_logits, _ = loss.gradient(logits[0].detach())
            self._price(logits, at_logits.unsqueeze(0), taps, 1, piece)
        self.tokens += hidden.shape[0] * hidden.shape[1]

    @torch.no_grad()
    def _agreement(self, hidden: Tensor, drafted: Tensor, batch: Batch) -> None:
        """Count where the draft's best guess for token t+2 is the model's, as it is and in every format."""
        spoken = self._best(self.runner.logits, hidden[:, 1:])
        self._count("BF16", self._best(self.runner.draft_logits, drafted), spoken)
        for name, weights in self._decoded():
            saved = {parameter: self.module.get_parameter(parameter).data for parameter in weights}
            try:
                for parameter, weight in weights.items():
                    self.module.get_parameter(parameter).data = weight.to(self.runner.dtype)
                again = self.runner.run_block(self.block.index, self.module, hidden, batch.inputs)
            finally:
                for parameter, weight in saved.items():
                    self.module.get_parameter(parameter).data = weight
            self._count(str(name), self._best(self.runner.draft_logits, again), spoken)

    def _decoded(self) -> Iterator[tuple[FormatName, Mapping[str, Tensor]]]:
        for name in self.formats:
            found: dict[str, Tensor] = {}
            for priced in self.pricing.priced.values():
                if name in priced:
                    found |= priced[name].decoded.weights
            if found:
                yield name, found

    def _best(self, logits_of: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        return most_likely(logits_of, hidden, self.loss.piece)

    def _count(self, name: str, guessed: Tensor, spoken: Tensor) -> None:
        self.agreed[name] = self.agreed.get(name, 0) + int((guessed == spoken).sum())

    def finish(self, tokens: int) -> BlockSensitivity:
        """Prices per token that it saw: the draft's loss is one of its own."""
        found = super().finish(self.tokens if self.block.kind is Kind.DRAFT else tokens)
        if self.agreed:
            found.figures["agreement"] = {name: count / self.tokens for name, count in self.agreed.items()}
        return found
