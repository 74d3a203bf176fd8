"""Claims about prices in every part of a model, against a reference that is nothing but autograd.

In the whole model an error is added to what a group puts out, scaled by one number ε_t for each token (or patch):
y_t + ε_t · (Q(x_t) Ŵᵀ − x_t Wᵀ). Then p_t is ∂L/∂ε_t at ε = 0, whatever the group is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from prismaquant_ray.backward.block import BlockBackward, HeadBackward
from prismaquant_ray.backward.cost_table import cost_table
from prismaquant_ray.backward.loss import IGNORED, Loss, sample
from prismaquant_ray.backward.price import Split
from prismaquant_ray.block_records import BackwardRecord, ForwardRecord
from prismaquant_ray.calibration.dataset import Batch, CalibrationSet
from prismaquant_ray.calibration.images import load_images
from prismaquant_ray.errors import InputError
from prismaquant_ray.factors import Equalization, Factors, factors_of
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.forward.block import BlockForward
from prismaquant_ray.forward.decoded_candidates import own
from prismaquant_ray.forward.encode import Rounding
from prismaquant_ray.layout import HEADS, Block, BlockKind, FusedGroup
from prismaquant_ray.model.layout_builder import Scope
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests.projections import Recorded
from tests.tiny import random_tokens
from tests.tiny_families import VISION_FAMILIES

IMAGES = Path(__file__).parents[2] / "configs/data/images/captions.jsonl"
USED = (FormatName.INT4, FormatName.NVFP4, FormatName.MXFP8, FormatName.BF16)
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "qwen3_5_moe")
SEED = 7


@dataclass
class Probed:
    """A tiny model after both passes, by the core's own block passes."""

    runner: ModelRunner
    calibration: CalibrationSet
    batches: tuple[Batch, ...]
    tensors: dict[int, dict[FormatName, dict[str, Tensor]]] = field(default_factory=dict)
    equalization: dict[int, Equalization] = field(default_factory=dict)
    forward: dict[int, ForwardRecord] = field(default_factory=dict)
    found: dict[int, BackwardRecord] = field(default_factory=dict)
    projected: dict[int, Recorded] = field(default_factory=dict)

    @classmethod
    def of(cls, directory: Path, family: str) -> Probed:
        sees = family in VISION_FAMILIES
        runner = ModelRunner(
            Checkpoint(Store(directory)),
            dtype=torch.float32,
            device=torch.device("cpu"),
            scope=Scope(images=sees, head=True),
        )
        tokens = random_tokens(4, 16, seed=3)
        calibration = CalibrationSet(tokens=tokens, holdout=torch.tensor([False, False, False, True]))
        if sees:
            assert runner.layout.image_token is not None
            images = load_images(IMAGES, directory, image_token=runner.layout.image_token, limit=2)
            calibration = calibration.with_images((image.inputs for image in images), 0.5)
        probed = cls(runner, calibration, calibration.batches(2))
        probed.run()
        return probed

    def run(self) -> None:
        runner, layout = self.runner, self.runner.layout
        hidden: dict[int, Tensor] = {}
        entering: dict[int, dict[int, Tensor]] = {}
        sighted = [m for m, batch in enumerate(self.batches) if "pixel_values" in batch.inputs]

        def forward(block: Block, microbatches: list[int]) -> None:
            block_pass = BlockForward(runner, block.index, USED, Rounding(), equalize=True)
            entering[block.index] = {m: hidden[m] for m in microbatches}
            for m in microbatches:
                output = block_pass.run(hidden[m], self.batches[m])
                if block.kind not in HEADS:
                    hidden[m] = output
            candidates = block_pass.finish()
            self.tensors[block.index], self.forward[block.index] = candidates.tensors, candidates.record
            self.equalization[block.index] = [
                (fold, candidates.factors[str(index)]) for index, fold in enumerate(candidates.record.folds)
            ]

        with torch.no_grad():
            if sighted:
                with runner.pixels():
                    hidden |= {m: runner.patches(self.batches[m].inputs) for m in sighted}
            for block in layout.of(BlockKind.VISION, BlockKind.MERGER):
                forward(block, sighted)
            with runner.entry():
                for m, batch in enumerate(self.batches):
                    hidden[m] = runner.embed(batch.inputs, hidden.get(m))
            every = list(range(len(self.batches)))
            for block in layout.of(BlockKind.DECODER):
                forward(block, every)
            texts = [m for m in every if m not in sighted]
            for block in layout.of(*HEADS):
                with runner.beside(block.index):
                    forward(block, texts if block.kind is BlockKind.DRAFT else every)
        loss = self.loss()
        gradient: dict[int, Tensor] = {}
        with runner.exit():
            for m, batch in enumerate(self.batches):
                gradient[m], _ = loss.gradient(runner.logits, hidden[m], batch)
        for block in reversed(layout.of(BlockKind.VISION, BlockKind.MERGER, BlockKind.DECODER)):
            made = self.tensors[block.index], self.equalization[block.index]
            block_pass = BlockBackward(runner, block.index, USED, *made)
            self.projected[block.index] = Recorded(block_pass)
            for m, x in entering[block.index].items():
                block_pass.forward(x, self.batches[m])
                gradient[m] = block_pass.backward(gradient[m], self.batches[m])
            self.found[block.index] = block_pass.finish(Split.of(self.calibration))
        for block in layout.of(*HEADS):
            with runner.beside(block.index):
                made = self.tensors[block.index], loss, self.equalization[block.index]
                head = HeadBackward(runner, block.index, USED, *made)
                self.projected[block.index] = Recorded(head.block_pass)
                for m, x in entering[block.index].items():
                    head.run(x, self.batches[m])
                self.found[block.index] = head.finish(Split.of(self.calibration))

    def loss(self) -> Loss:
        layout = self.runner.layout
        return Loss(labels="sampled", seed=SEED, vocab_size=layout.vocab_size, image_token=layout.image_token)


@pytest.fixture(scope="module")
def probes(families: Mapping[str, Path]) -> Mapping[str, Probed]:
    """Every family, probed when it is first asked for."""

    class Made(dict[str, Probed]):
        def __missing__(self, family: str) -> Probed:
            self[family] = Probed.of(families[family], family)
            return self[family]

    return Made()


# The reference --------------------------------------------------------------------------------------------------


class Perturbed:
    """A whole model of transformers in which one group's outputs carry ε-scaled errors."""

    def __init__(self, directory: Path, family: str) -> None:
        auto = AutoModelForImageTextToText if family in VISION_FAMILIES else AutoModelForCausalLM
        ALL_EXPERTS_FUNCTIONS.register("perturbed", self._experts)
        self.model = auto.from_pretrained(directory, dtype=torch.float32, experts_implementation="perturbed")
        self.model.requires_grad_(False)
        self.errors: dict[int, tuple[Any, Any]] = {}
        self.epsilon = torch.zeros(0)
        #: Tokens with an input, or a label, that the last bits of its computation decide.
        self.undecided = torch.zeros(0, dtype=torch.bool)
        self.group = ""

    def judged(
        self,
        group: FusedGroup,
        name: FormatName,
        tensors: Mapping[str, Tensor],
        factors: Mapping[str, Factors],
        batch: Batch,
    ) -> tuple[Tensor, Tensor]:
        """p of every token, and whether the last bits of an input decide how it is rounded."""
        return self.p(group, name, tensors, factors, batch), self.undecided

    def p(
        self,
        group: FusedGroup,
        name: FormatName,
        tensors: Mapping[str, Tensor],
        factors: Mapping[str, Factors],
        batch: Batch,
    ) -> Tensor:
        """∂L/∂ε of every token, or patch, with the labels that the probe samples."""
        spec = FORMATS[name]
        assert spec.codec is not None
        tokens = batch.tokens.numel()
        if "visual" in group.name:
            tokens = int(batch.inputs["image_grid_thw"].prod())
            if "merger" in group.name:
                tokens //= 4
        self.epsilon = torch.zeros(tokens, requires_grad=True)
        self.undecided = torch.zeros(tokens, dtype=torch.bool)
        self.group = group.name
        with ExitStack() as stack:
            for matrix in group.matrices:
                for number, linear in enumerate(matrix.linears):
                    decoded = spec.codec.decode(own(tensors, linear)).float()
                    scale = tensors.get(f"{linear.names[0]}.input_global_scale")
                    packed = linear.experts is not None
                    folded = factors.get(matrix.parameters[0 if packed else number], Factors())
                    s = torch.ones(linear.in_features) if folded.columns is None else folded.columns
                    decoded = decoded / s.unsqueeze(-2)
                    if folded.rows is not None:
                        rows = folded.rows[..., matrix.rows[number]] if packed else folded.rows
                        decoded = decoded / rows.unsqueeze(-1)

                    def rounded(x: Tensor, expert: int = 0, scale: Tensor | None = scale, s: Tensor = s) -> Tensor:
                        s = s if s.dim() == 1 else s[expert]
                        return x if spec.round_activation is None else spec.round_activation(x / s, scale) * s

                    if linear.experts is None:
                        module = self.model.get_submodule(linear.name)
                        handle = module.register_forward_hook(self._hook(decoded, rounded))
                        stack.callback(handle.remove)
                    else:
                        path, _, leaf = linear.name.rpartition(".{}.")
                        path = path.replace("block_sparse_moe", "mlp")
                        leaf = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(leaf, leaf)
                        key = (id(self.model.get_submodule(path)), leaf)
                        self.errors[key] = (decoded, rounded)  # type: ignore[index]
            logits = self.model(**batch.inputs).logits
            self.errors.clear()
            loss = F.cross_entropy(logits.flatten(0, 1), self._labels(logits, batch), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, self.epsilon)
        return gradient

    def _labels(self, logits: Tensor, batch: Batch) -> Tensor:
        labels = []
        for row, own_logits in enumerate(logits.detach()):
            uniform = np.random.default_rng((SEED, batch.first_sequence + row)).random(len(own_logits))
            probabilities, uniform = torch.softmax(own_logits, -1), torch.from_numpy(uniform)
            target = sample(probabilities, uniform)
            unsure = torch.stack([sample(probabilities, uniform + move) != target for move in (-1e-6, 1e-6)]).any(0)
            if "visual" not in self.group:
                self.undecided[row * len(target) : (row + 1) * len(target)] |= unsure
            image = getattr(self.model.config, "image_token_id", None)
            if image is not None:
                target[:-1][batch.tokens[row, 1:] == image] = IGNORED
            labels.append(target)
        return torch.cat(labels)

    def _hook(self, decoded: Tensor, rounded: Any) -> Any:
        def add(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0].detach().flatten(0, -2)
            error = self._rounded(rounded, x, slice(None), 0) @ decoded.T - x @ module.weight.T
            return output + (self.epsilon.unsqueeze(-1) * error).view(output.shape)

        return add

    def _rounded(self, rounded: Any, x: Tensor, tokens: slice, expert: int) -> Tensor:
        """The inputs (rows, I) of some tokens, rounded."""
        found: Tensor = rounded(x, expert)
        for seed in range(4):
            signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
            moved = (rounded(x * (1 + 1e-5 * signs), expert) - found).abs()
            self.undecided[tokens] |= (moved > 1e-4 * x.abs().amax(-1, keepdim=True)).any(-1)
        return found

    def _experts(self, module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Token by token, expert by expert."""
        width = module.down_proj.shape[2]
        rows = []
        for token, x in enumerate(hidden):
            total = torch.zeros_like(x)
            for choice, expert in enumerate(chosen[token].tolist()):
                gate = self._one(module, "gate_proj", module.gate_up_proj[expert, :width], x, expert, token)
                up = self._one(module, "up_proj", module.gate_up_proj[expert, width:], x, expert, token)
                inner = module.act_fn(gate) * up
                down = self._one(module, "down_proj", module.down_proj[expert], inner, expert, token)
                total = total + weights[token, choice] * down
            rows.append(total)
        return torch.stack(rows)

    def _one(self, module: Any, leaf: str, weight: Tensor, x: Tensor, expert: int, token: int) -> Tensor:
        output = weight @ x
        found = self.errors.get((id(module), leaf))  # type: ignore[call-overload]
        if found is None:
            return output
        decoded, rounded = found
        clean = x.detach()
        seen = self._rounded(rounded, clean.unsqueeze(0), slice(token, token + 1), expert)[0]
        error = decoded[expert] @ seen - weight @ clean
        return output + self.epsilon[token] * error


def parts(probed: Probed, name: str) -> list[FusedGroup]:
    """One group of each sort in each part of the model, so that the reference stays fast."""
    found: dict[tuple[BlockKind, str], FusedGroup] = {}
    for block in probed.runner.layout.blocks:
        if block.kind is BlockKind.DRAFT:
            continue
        for group in block.groups:
            found.setdefault((block.kind, group.name.rpartition(".")[2]), group)
    return [group for group in found.values() if FORMATS[FormatName(name)].codec]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [FormatName.INT4, FormatName.NVFP4])
def test_p_is_the_derivative_by_the_size_of_each_tokens_error(
    families: Mapping[str, Path], probes: Mapping[str, Probed], family: str, name: FormatName
) -> None:
    probed = probes[family]
    reference = Perturbed(families[family], family)
    for group in parts(probed, name):
        block = probed.runner.layout.block_of[group.name]
        sees = [b for b in probed.batches if "pixel_values" in b.inputs]
        batches = sees if block.kind in (BlockKind.VISION, BlockKind.MERGER) else list(probed.batches)
        if (group.name, str(name)) not in probed.projected[block.index]:
            continue  # the shape does not allow the format
        made = probed.tensors[block.index][name], factors_of(probed.equalization[block.index])
        judged = [reference.judged(group, name, *made, batch) for batch in batches]
        expected, undecided = (torch.cat(each) for each in zip(*judged, strict=True))
        found = probed.projected[block.index].of(group.name, str(name))
        # The reference has other last bits: where they decide how an input is rounded, or a label, it says nothing.
        assert undecided.float().mean() < 0.1
        expected = torch.where(undecided, found, expected)
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(
            found, expected, rtol=2e-3, atol=2e-4 * scale, msg=lambda m, g=group: f"{g.name} {m}"
        )
        cost = probed.found[block.index].groups[group.name][name].cost
        # N is every position of the calibration set, for patches and routed tokens too.
        assert cost == pytest.approx(
            float(0.5 * expected.double().square().sum()) / probed.calibration.positions, rel=2e-3
        )


@pytest.mark.slow
def test_the_draft_is_priced_by_its_own_loss(families: Mapping[str, Path], probes: Mapping[str, Probed]) -> None:
    """Σ p_t = ⟨∂L/∂W, ΔW⟩ for CE against tokens sampled from the draft, two ahead, by autograd through the draft."""
    probed = probes["qwen3_5_moe"]
    runner = probed.runner
    (block,) = runner.layout.of(BlockKind.DRAFT)
    module = runner.load_block(block.index)
    texts = [batch for batch in probed.batches if "pixel_values" not in batch.inputs]
    for name in ("mtp.layers.0.self_attn.qkv_proj", "mtp.layers.0.mlp.shared_expert.down_proj"):
        group = next(group for group in block.groups if group.name == name)
        total = 0.0
        seen = 0
        for batch in texts:
            last = hidden_of(probed, batch)
            (matrix,) = group.matrices
            parameters = matrix.parameters
            weights = [module.get_parameter(parameter).requires_grad_() for parameter in parameters]
            with torch.enable_grad(), runner.beside(block.index):
                logits = runner.draft_logits(runner.run_block(block.index, module, last, batch.inputs))
            labels = []
            for row, own_logits in enumerate(logits.detach()):
                uniform = np.random.default_rng((SEED, batch.first_sequence + row, 1)).random(len(own_logits))
                labels.append(sample(torch.softmax(own_logits, -1), torch.from_numpy(uniform)))
            seen += len(torch.cat(labels))
            loss = F.cross_entropy(logits.flatten(0, 1), torch.cat(labels), reduction="sum")
            tensors = probed.tensors[block.index][FormatName.INT4]
            codec = FORMATS[FormatName.INT4].codec
            assert codec is not None
            gradients = torch.autograd.grad(loss, weights)
            factors = factors_of(probed.equalization[block.index])
            for linear, parameter, weight, gradient in zip(matrix.linears, parameters, weights, gradients, strict=True):
                decoded = codec.decode(own(tensors, linear)).float()
                if parameter in factors:
                    decoded = factors[parameter].undo(decoded)
                total += float((gradient * (decoded - weight.requires_grad_(False))).sum())
        p = probed.projected[block.index].of(name, "INT4")
        assert len(p) == seen
        assert float(p.double().sum()) == pytest.approx(total, rel=2e-3, abs=1e-4)


def hidden_of(probed: Probed, batch: Batch) -> Tensor:
    """What leaves the last decoder layer."""
    runner = probed.runner
    with torch.no_grad():
        with runner.entry():
            hidden = runner.embed(batch.inputs)
        for block in runner.layout.of(BlockKind.DECODER):
            hidden = runner.run_block(block.index, runner.load_block(block.index), hidden, batch.inputs)
    return hidden


def test_data_labels_of_the_draft_are_two_tokens_ahead() -> None:
    tokens = random_tokens(2, 8)
    batch = Batch(inputs={"input_ids": tokens}, holdout=torch.zeros(2, dtype=torch.bool), first_sequence=0)
    loss = Loss(labels="data", seed=0, vocab_size=320)
    for row, where, piece in loss.pieces(7, batch, stream=1, device=torch.device("cpu")):
        assert where == slice(0, 7)
        assert piece.following.tolist() == [*tokens[row, 2:].tolist(), IGNORED]
    for row, where, piece in loss.pieces(8, batch, device=torch.device("cpu")):
        assert where == slice(0, 8)
        assert piece.following.tolist() == [*tokens[row, 1:].tolist(), IGNORED]


@pytest.mark.slow
def test_agreement_of_the_draft_is_counted_as_it_is_and_in_every_format(probes: Mapping[str, Probed]) -> None:
    probed = probes["qwen3_5_moe"]
    runner = probed.runner
    (block,) = runner.layout.of(BlockKind.DRAFT)
    agreement = probed.found[block.index].agreement
    assert list(agreement) == ["BF16", "INT4", "NVFP4", "MXFP8"]
    agreed = seen = 0
    for batch in probed.batches:
        if "pixel_values" in batch.inputs:
            continue
        last = hidden_of(probed, batch)
        with torch.no_grad(), runner.beside(block.index):
            drafted = runner.run_block(block.index, runner.load_block(block.index), last, batch.inputs)
            guess = runner.draft_logits(drafted).argmax(-1)
            spoken = runner.logits(last).argmax(-1)[:, 1:]
        agreed += int((guess == spoken).sum())
        seen += guess.numel()
    assert agreement["BF16"] == agreed / seen


def test_a_weight_on_the_draft_scales_its_prices_only(probes: Mapping[str, Probed]) -> None:
    probed = probes["qwen3_5_moe"]
    layout = probed.runner.layout
    backward = dict(probed.found)
    once, tenth = (cost_table(layout, USED, probed.forward, backward, draft_weight=w) for w in (1.0, 0.1))
    for row, group in enumerate(layout.groups):
        factor = 0.1 if layout.block_of[group.name].kind is BlockKind.DRAFT else 1.0
        np.testing.assert_allclose(tenth.token_fisher[row], factor * once.token_fisher[row], rtol=1e-12)
        np.testing.assert_allclose(tenth.fisher_trace[row], factor * once.fisher_trace[row], rtol=1e-12)


def test_a_tower_without_a_gradient_is_an_error(probes: Mapping[str, Probed]) -> None:
    probed = probes["qwen3_5_moe"]
    block = probed.runner.layout.of(BlockKind.VISION)[0]
    block_pass = BlockBackward(probed.runner, block.index, USED, probed.tensors[block.index])
    batch = next(batch for batch in probed.batches if "pixel_values" in batch.inputs)
    with probed.runner.pixels(), torch.no_grad():
        patches = probed.runner.patches(batch.inputs)
    output = block_pass.forward(patches, batch)
    block_pass.backward(torch.zeros_like(output), batch)
    with pytest.raises(InputError, match=r"visual\.blocks\.0: no gradient reaches it"):
        block_pass.finish(Split(tokens=100, held_out_tokens=0))


def test_experts_are_counted_and_a_cold_one_is_sound(probes: Mapping[str, Probed]) -> None:
    probed = probes["qwen3_moe"]
    for block in probed.runner.layout.of(BlockKind.DECODER):
        (tokens,) = probed.forward[block.index].experts.values()
        assert sum(tokens) == 2 * probed.calibration.positions
        figures = probed.forward[block.index].linears[f"{block.prefix}.mlp.experts.{{}}.gate_proj"]["nvfp4"]
        for count, method in zip(tokens, figures.method, strict=True):
            assert count or method != "gptq", "no token, no GPTQ"
        for tensors in probed.tensors[block.index].values():
            assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors.values())
    scales = {
        float(tensor)
        for name, tensor in probed.tensors[0][FormatName.NVFP4].items()
        if "experts" in name and "gate_proj.input_global_scale" in name
    }
    assert len(scales) == 1, "vLLM applies one expert's input scale to all"
