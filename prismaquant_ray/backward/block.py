"""One block of the backward pass: recompute it, take output gradients, price every candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from prismaquant_ray.backward.cache_pricing import NO_SCALES, CachePricing
from prismaquant_ray.backward.loss import DRAFT, Loss
from prismaquant_ray.backward.price import Split
from prismaquant_ray.backward.pricing import Passed, Pricing
from prismaquant_ray.block_records import BackwardRecord, CacheScales
from prismaquant_ray.calibration.dataset import Batch
from prismaquant_ray.factors import Equalization, factors_of
from prismaquant_ray.formats import FormatName
from prismaquant_ray.forward.decoded_candidates import CandidateTensors
from prismaquant_ray.layout import Block, BlockKind
from prismaquant_ray.model.capture import CapturedActivations, capture_activations
from prismaquant_ray.model.mtp_head import most_likely
from prismaquant_ray.model.runner import ModelRunner


class Recomputed(NamedTuple):
    """A block's graph: its input and output (sequences, tokens, H), and its matrices' inputs and outputs."""

    hidden: Tensor
    output: Tensor
    captured: CapturedActivations


class BlockBackward:
    """A block while it is loaded for the backward pass.

    Microbatches must come in order, `forward` then `backward` for each, then `finish`. Without formats it only passes
    gradients on, and there is nothing to finish.
    """

    def __init__(
        self,
        runner: ModelRunner,
        index: int,
        formats: Sequence[FormatName],
        candidates: CandidateTensors,
        equalization: Equalization = (),
        cache: Mapping[str, CacheScales] = NO_SCALES,
    ) -> None:
        self.runner = runner
        self.block: Block = runner.layout.blocks[index]
        self.module = runner.load_block(index)
        self.formats = tuple(formats)
        self._graph: Recomputed | None = None
        self.pricing = Pricing(self.block, self.module, formats, candidates, runner.copies, factors_of(equalization))
        self.cache_pricing = CachePricing(self.block, cache, equalization, runner.device)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The block's output for hidden (sequences, tokens, H); its graph is held until `backward`."""
        self._graph = self.recompute(hidden, batch)
        return self._graph.output.detach()

    def backward(self, grad_output: Tensor, batch: Batch) -> Tensor:
        """∂L/∂hidden for ∂L/∂output, both (sequences, tokens, H); prices every candidate on the way.

        The merger gets the gradient of the decoder's whole input and uses the positions of image tokens.
        """
        assert self._graph is not None, "forward comes first"
        graph, self._graph = self._graph, None
        if self.block.kind is BlockKind.MERGER:
            grad_output = grad_output[batch.tokens.to(grad_output.device) == self.runner.layout.image_token]
        return self.differentiate(graph, grad_output, batch.holdout)

    def finish(self, split: Split) -> BackwardRecord:
        """Prices per token; InputError when no gradient reached the block."""
        return replace(self.pricing.finish(split), cache=self.cache_pricing.finish(split.tokens))

    def recompute(self, hidden: Tensor, batch: Batch) -> Recomputed:
        """Run the block with a graph for hidden (sequences, tokens, H)."""
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad(), capture_activations(self.module, self.block) as captured:
            output = self.runner.run_block(self.block.index, self.module, hidden, batch.inputs)
        return Recomputed(hidden, output, captured)

    def differentiate(self, graph: Recomputed, grad_output: Tensor, holdout: Tensor) -> Tensor:
        """∂L/∂hidden of a microbatch; the gradients inside the block price every candidate.

        `holdout` (sequences,) marks its sequences that are held out.
        """
        captured = graph.captured
        parameters = list(captured.outputs)
        watched = [captured.entries[name] for name in parameters] + [captured.outputs[name] for name in parameters]
        watched += [each for name in self.cache_pricing.scales for each in captured.cached[name]]
        gradient, *inside = torch.autograd.grad(graph.output, [graph.hidden, *watched], grad_output)
        checked = [gradient]
        if self.formats:
            count = len(parameters)
            at_inputs, at_outputs = inside[:count], inside[count : 2 * count]
            with torch.no_grad():
                passed = dict(zip(parameters, map(Passed, at_inputs, at_outputs), strict=True))
                # A NaN gradient yields a NaN price.
                priced = self.pricing.add(captured, passed, holdout)
                checked += [] if priced is None else [priced]
                checked += self.cache_pricing.add(captured.cached, inside[2 * count :], len(holdout))
        name = self.block.prefix or self.block.groups[0].name
        self.runner.checks.add(f"{name} has NaN or infinite gradients; is the checkpoint intact?", *checked)
        return gradient


class HeadBackward:
    """The block pass of a draft head or an output head: it has its own loss, and passes no gradient on.

    Call `run` for each microbatch inside the runner's `beside`, then `finish`.
    """

    def __init__(
        self,
        runner: ModelRunner,
        index: int,
        formats: Sequence[FormatName],
        candidates: CandidateTensors,
        loss: Loss,
        equalization: Equalization = (),
        cache: Mapping[str, CacheScales] = NO_SCALES,
    ) -> None:
        self.runner = runner
        self.block_pass = BlockBackward(runner, index, formats, candidates, equalization, cache)
        self.block = self.block_pass.block
        self.loss = loss
        self.tokens = 0
        #: Positions where draft and model agree on the token, by the format of the whole draft head.
        self.agreed: dict[str, int] = {}

    def run(self, hidden: Tensor, batch: Batch) -> None:
        """Price a microbatch, for the last decoder layer's output (sequences, tokens, H)."""
        if self.block.kind is BlockKind.DRAFT:
            drafted = self.block_pass.forward(hidden, batch)
            gradient, _ = self.loss.gradient(self.runner.draft_logits, drafted, batch, stream=DRAFT)
            self.block_pass.backward(gradient, batch)
            self.tokens += drafted.shape[0] * drafted.shape[1]
            self._agreement(hidden, drafted, batch)
            return
        for row, where, loss in self.loss.pieces(hidden.shape[1], batch, device=hidden.device):
            graph = self.block_pass.recompute(hidden[row : row + 1, where], batch)
            at_logits, _ = loss.gradient(graph.output[0].detach())
            self.block_pass.differentiate(graph, at_logits.unsqueeze(0), batch.holdout[row : row + 1])
        self.tokens += hidden.shape[0] * hidden.shape[1]

    @torch.no_grad()
    def _agreement(self, hidden: Tensor, drafted: Tensor, batch: Batch) -> None:
        """Count where the draft's best guess for token t+2 is the model's, as it is and in every format."""
        spoken = self._best(self.runner.logits, hidden[:, 1:])
        self._count("BF16", self._best(self.runner.draft_logits, drafted), spoken)
        for name, weights in self._decoded():
            saved = {parameter: self.block_pass.module.get_parameter(parameter).data for parameter in weights}
            try:
                for parameter, weight in weights.items():
                    self.block_pass.module.get_parameter(parameter).data = weight.to(self.runner.dtype)
                again = self.runner.run_block(self.block.index, self.block_pass.module, hidden, batch.inputs)
            finally:
                for parameter, weight in saved.items():
                    self.block_pass.module.get_parameter(parameter).data = weight
            self._count(str(name), self._best(self.runner.draft_logits, again), spoken)

    def _decoded(self) -> Iterator[tuple[FormatName, Mapping[str, Tensor]]]:
        for name in self.block_pass.formats:
            found: dict[str, Tensor] = {}
            pricing = self.block_pass.pricing
            for decoded in pricing.decoded.values():
                if name in decoded:
                    found |= {each: pricing.unfolded(weight, each) for each, weight in decoded[name].weights.items()}
            if found:
                yield name, found

    def _best(self, logits_of: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        return most_likely(logits_of, hidden, self.loss.piece)

    def _count(self, name: str, guessed: Tensor, spoken: Tensor) -> None:
        self.agreed[name] = self.agreed.get(name, 0) + int((guessed == spoken).sum())

    def finish(self, split: Split) -> BackwardRecord:
        """Prices per token; of a draft head per token of its own loss."""
        if self.block.kind is BlockKind.DRAFT:
            held_out = round(self.tokens * split.held_out_tokens / split.tokens)
            split = Split(tokens=self.tokens, held_out_tokens=held_out)
        found = self.block_pass.finish(split)
        if not self.agreed:
            return found
        return replace(found, agreement={name: count / self.tokens for name, count in self.agreed.items()})
