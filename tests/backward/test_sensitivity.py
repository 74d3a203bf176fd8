"""Claims about the probe and the price of a candidate, against autograd through the whole model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from prismaquant_ray.backward.block import BlockBackward
from prismaquant_ray.backward.loss import Labels, Loss, sample
from prismaquant_ray.backward.price import Split, price, price_on, sums_of_squares
from prismaquant_ray.block_records import BackwardRecord
from prismaquant_ray.calibration.dataset import Batch, CalibrationSet
from prismaquant_ray.errors import InputError
from prismaquant_ray.formats import FORMATS, FormatName
from prismaquant_ray.forward.block import BlockForward
from prismaquant_ray.forward.encode import Rounding
from prismaquant_ray.model.runner import ModelRunner
from prismaquant_ray.source.checkpoint import Checkpoint
from prismaquant_ray.storage.store import Store
from tests.projections import Recorded
from tests.tiny import make_checkpoint, random_tokens

FORMATS_USED = (FormatName.NVFP4, FormatName.NVFP4A16, FormatName.MXFP8, FormatName.BF16)
SEQUENCES, LENGTH, SEED = 4, 24, 7


def backward(block_pass: BlockBackward, hidden: Tensor, gradient: Tensor, batch: Batch) -> Tensor:
    block_pass.forward(hidden, batch)
    return block_pass.backward(gradient, batch)


def loss_of(runner: ModelRunner, labels: Labels, seed: int) -> Loss:
    return Loss(labels=labels, seed=seed, vocab_size=runner.layout.vocab_size)


class Probed:
    """A tiny model probed by our two passes, and the pieces to check them with."""

    def __init__(self, directory: Path, labels: Labels) -> None:
        self.tokens = random_tokens(SEQUENCES, LENGTH, seed=3)
        self.runner = ModelRunner(Checkpoint(Store(directory)), dtype=torch.float32, device=torch.device("cpu"))
        held = torch.tensor([False, False, False, True])
        calibration = CalibrationSet(tokens=self.tokens, holdout=held)
        batches = calibration.batches(2)
        with self.runner.entry(), torch.no_grad():
            hidden = [self.runner.embed(batch.inputs) for batch in batches]
        entering, self.candidates = [], []
        for index in range(len(self.runner.layout.blocks)):
            block_pass = BlockForward(self.runner, index, FORMATS_USED, Rounding())
            entering.append(hidden)
            hidden = [block_pass.run(each, batch) for each, batch in zip(hidden, batches, strict=True)]
            self.candidates.append(block_pass.finish())
        loss = loss_of(self.runner, labels, SEED)
        with self.runner.exit():
            exits = [
                loss.gradient(self.runner.logits, each, batch) for each, batch in zip(hidden, batches, strict=True)
            ]
        self.loss = sum(value for _, value in exits)
        gradients = [gradient for gradient, _ in exits]
        self.sensitivity: dict[int, BackwardRecord] = {}
        self.projected: dict[int, Recorded] = {}
        for index in reversed(range(len(entering))):
            block_pass = BlockBackward(self.runner, index, FORMATS_USED, self.candidates[index].tensors)
            self.projected[index] = Recorded(block_pass)
            gradients = [
                backward(block_pass, each, gradient, batch)
                for each, gradient, batch in zip(entering[index], gradients, batches, strict=True)
            ]
            self.sensitivity[index] = block_pass.finish(Split.of(calibration))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "m", "qwen2")


@pytest.fixture(scope="module")
def probed(directory: Path) -> Probed:
    return Probed(directory, "sampled")


def whole_model_gradients(directory: Path, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Input and output gradient of every Linear by plain autograd, with the labels our probe sampled."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str):
        def record(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = args[0].detach()
            outputs[name] = output
            output.retain_grad()

        return record

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(hook(name))
    logits = model(tokens).logits
    labels = torch.stack(
        [
            sample(torch.softmax(row.detach(), -1), torch.from_numpy(np.random.default_rng((SEED, i)).random(LENGTH)))
            for i, row in enumerate(logits)
        ]
    )
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    gradients = {}
    for name, output in outputs.items():
        assert output.grad is not None
        gradients[name] = output.grad
    return inputs, gradients, float(loss.detach())


def test_cost_and_trace_equal_per_token_autograd(directory: Path, probed: Probed) -> None:
    inputs, gradients, loss = whole_model_gradients(directory, probed.tokens)
    assert probed.loss == pytest.approx(loss, rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).requires_grad_(False)
    for block in probed.runner.layout.blocks:
        found = probed.sensitivity[block.index]
        tensors = probed.candidates[block.index].tensors
        for group in block.groups:
            for name in (FormatName.NVFP4, FormatName.NVFP4A16, FormatName.MXFP8):
                spec = FORMATS[name]
                assert spec.codec is not None
                expected = torch.zeros(SEQUENCES, LENGTH)
                for linear in group.linears:
                    own = {
                        k.removeprefix(f"{linear.name}."): v
                        for k, v in tensors[name].items()
                        if k.startswith(f"{linear.name}.")
                    }
                    decoded = spec.codec.decode(own).float()
                    x = inputs[linear.name]
                    rounded = (
                        x if spec.round_activation is None else spec.round_activation(x, own.get("input_global_scale"))
                    )
                    error = rounded @ decoded.T - x @ model.get_parameter(linear.sources[0]).T
                    expected += (gradients[linear.name] * error).sum(-1)
                p = probed.projected[block.index].of(group.name, name)
                assert p.dtype == torch.float32
                largest = float(expected.abs().max())
                torch.testing.assert_close(p, expected.flatten(), rtol=1e-3, atol=1e-4 * largest)
                cost = found.groups[group.name][name].cost
                assert cost == pytest.approx(
                    float(0.5 * expected.double().square().sum()) / (SEQUENCES * LENGTH), rel=1e-3
                )
        for linear in block.linears:
            g, x = gradients[linear.name], inputs[linear.name]
            trace = float((g.square().sum(-1) * x.square().sum(-1)).sum()) / (SEQUENCES * LENGTH)
            assert found.fisher_trace[linear.name] == pytest.approx(trace, rel=1e-3)


def test_the_parts_of_a_cost_are_those_of_weights_and_of_activations(probed: Probed) -> None:
    """NVFP4A16 has NVFP4's weights and exact activations: its cost is NVFP4's weight part, and has no other."""
    for block in probed.runner.layout.blocks:
        found = probed.sensitivity[block.index]
        for group in block.groups:
            figures = found.groups[group.name]
            both, weights = figures[FormatName.NVFP4], figures[FormatName.NVFP4A16]
            p, p_weights = (
                probed.projected[block.index].of(group.name, name).double() for name in ("NVFP4", "NVFP4A16")
            )
            assert weights.activation_cost == 0.0
            assert weights.weight_cost == pytest.approx(weights.cost, rel=1e-9)
            assert both.weight_cost == pytest.approx(weights.cost, rel=1e-9)
            added = float(0.5 * (p - p_weights).square().sum()) / p.numel()
            assert both.activation_cost == pytest.approx(added, rel=1e-4)
            assert added > 0


def test_the_first_order_term_is_the_derivative_along_the_weight_error(directory: Path, probed: Probed) -> None:
    """Σ p_t = ⟨∂L/∂W, ΔW⟩, with the weight's gradient taken by autograd in float64."""
    group = probed.runner.layout.blocks[0].groups[3]
    (linear,) = group.linears
    codec = FORMATS[FormatName.NVFP4A16].codec
    assert codec is not None
    tensors = probed.candidates[0].tensors[FormatName.NVFP4A16]
    own = {k.removeprefix(f"{linear.name}."): v for k, v in tensors.items() if k.startswith(f"{linear.name}.")}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).requires_grad_(False)
    weight = model.get_parameter(linear.sources[0]).requires_grad_()
    logits = model(probed.tokens).logits
    uniform = [torch.from_numpy(np.random.default_rng((SEED, i)).random(LENGTH)) for i in range(SEQUENCES)]
    labels = torch.stack(
        [sample(torch.softmax(row.detach().float(), -1), u) for row, u in zip(logits, uniform, strict=True)]
    )
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weight)
    derivative = float((gradient * (codec.decode(own).double() - weight.detach())).sum())
    p = probed.projected[0].of(group.name, "NVFP4A16").double()
    assert float(p.sum()) == pytest.approx(derivative, rel=1e-4)


def test_activation_rounding_is_in_the_price(probed: Probed) -> None:
    for found in probed.sensitivity.values():
        for prices in found.groups.values():
            assert prices[FormatName.NVFP4].cost != prices[FormatName.NVFP4A16].cost
            assert prices[FormatName.MXFP8].cost < prices[FormatName.NVFP4].cost


def test_data_labels_give_the_gradient_of_the_training_loss(directory: Path) -> None:
    runner = ModelRunner(Checkpoint(Store(directory)), dtype=torch.float32, device=torch.device("cpu"))
    tokens = random_tokens(2, 16)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected = float(model(tokens, labels=tokens).loss.detach()) * 2 * 15
    (batch,) = CalibrationSet(tokens=tokens, holdout=torch.zeros(2, dtype=torch.bool)).batches(2)
    with torch.no_grad(), runner.entry():
        hidden = runner.embed(batch.inputs)
        for index in range(len(runner.layout.blocks)):
            hidden = runner.run_block(index, runner.load_block(index), hidden, batch.inputs)
    with runner.exit():
        gradient, loss = loss_of(runner, "data", 0).gradient(runner.logits, hidden, batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradient[:, -1] == 0).all()


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -30.0]).expand(20_000, 4)
    uniform = torch.from_numpy(np.random.default_rng(0).random(20_000))
    counts = torch.bincount(sample(torch.softmax(logits, -1), uniform), minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.softmax(logits[0], -1), atol=0.012, rtol=0)
    ends = sample(torch.softmax(logits[:2], -1), torch.tensor([0.0, 1.0 - 1e-12], dtype=torch.float64))
    assert ends.tolist()[0] == 0
    assert 0 <= ends.tolist()[1] < 4


def of_causes(p: Tensor) -> Tensor:
    """Sums of squares of p (sequences, tokens), and of no other cause."""
    squares = sums_of_squares(p) / 2
    return torch.stack([squares, torch.zeros_like(squares), squares])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_prices_are_of_fitted_and_of_held_out_sequences_apart(
    fitted: int, held_out: int, length: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(fitted + held_out, length, generator=generator)
    holdout = torch.arange(len(p)) < held_out
    holdout = holdout[torch.randperm(len(p), generator=generator)]
    split = Split(tokens=p.numel(), held_out_tokens=held_out * length)
    found = price(of_causes(p), holdout, split)
    for part, rows in ((found, p), (found.held_out, p[holdout]), (found.fitted, p[~holdout])):
        alone = price_on(of_causes(rows), rows.numel())
        assert (part.cost, part.standard_error, part.weight_cost, part.activation_cost) == (
            alone.cost, alone.standard_error, 0.0, alone.cost
        )  # fmt: skip
    share = held_out / len(p)
    assert found.cost == pytest.approx(share * found.held_out.cost + (1 - share) * found.fitted.cost)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_price_is_the_mean_and_its_jackknife(sequences: int, length: int, seed: int) -> None:
    p = torch.randn(sequences, length, generator=torch.Generator().manual_seed(seed))
    found = price_on(of_causes(p), p.numel())
    assert found.cost == pytest.approx(0.5 * float(p.double().square().mean()))
    leave_one_out = [0.5 * float(torch.cat([p[:s], p[s + 1 :]]).double().square().mean()) for s in range(sequences)]
    centre = sum(leave_one_out) / sequences
    spread = math.sqrt((sequences - 1) / sequences * sum((v - centre) ** 2 for v in leave_one_out))
    assert found.standard_error == pytest.approx(spread, rel=1e-6, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 9), st.integers(0, 40), st.integers(0, 2**31))
def test_tokens_that_are_not_in_p_count_as_zero(sequences: int, length: int, more: int, seed: int) -> None:
    """Routed tokens and patches are fewer, or others, than the tokens a price is given for."""
    p = torch.randn(sequences, length, generator=torch.Generator().manual_seed(seed))
    found, own = (price_on(of_causes(p), tokens) for tokens in (p.numel() + more, p.numel()))
    share = p.numel() / (p.numel() + more)
    for figure in ("cost", "standard_error"):
        assert getattr(found, figure) == pytest.approx(share * getattr(own, figure), rel=1e-6, abs=1e-12)
    padded = torch.cat([p.flatten(), torch.zeros(more)])
    assert found.cost == pytest.approx(0.5 * float(padded.double().square().mean()))


def test_labels_depend_on_the_sequence_and_its_stream_only() -> None:
    tokens = random_tokens(4, 12)
    hidden = torch.randn(4, 12, 6, generator=torch.Generator().manual_seed(1))
    head = torch.randn(6, 320, generator=torch.Generator().manual_seed(2))
    drawn = CalibrationSet(tokens=tokens, holdout=torch.zeros(4, dtype=torch.bool))

    def gradients(size: int, vocab_size: int, stream: int = 0) -> Tensor:
        # A huge vocabulary is a piece of one position.
        loss = Loss(labels="sampled", seed=5, vocab_size=vocab_size)
        batches = drawn.batches(size)
        found = [
            loss.gradient(lambda x: x @ head, hidden[batch.first_sequence :][: len(batch.tokens)], batch, stream=stream)
            for batch in batches
        ]
        return torch.cat([gradient for gradient, _ in found])

    whole = gradients(4, 320)
    for size, vocab_size in ((1, 320), (3, 320), (4, 1 << 24), (2, 1 << 22)):
        torch.testing.assert_close(gradients(size, vocab_size), whole)
    assert not torch.allclose(gradients(4, 320, stream=1), whole)


@pytest.mark.parametrize("labels", ["sampled", "data"])
def test_no_loss_is_taken_where_an_image_would_have_to_be_predicted(labels: Labels) -> None:
    image = 7
    tokens = random_tokens(2, 10)
    tokens[:, 4:7] = image
    (batch,) = CalibrationSet(tokens=tokens, holdout=torch.zeros(2, dtype=torch.bool)).batches(2)
    hidden, head = torch.randn(2, 10, 6), torch.randn(6, 320)
    loss = Loss(labels=labels, seed=5, vocab_size=320, image_token=image)
    gradient, value = loss.gradient(lambda x: x @ head, hidden, batch)
    silent = (gradient == 0).all(-1)
    expected = torch.zeros(10, dtype=torch.bool)
    expected[3:6] = True  # the positions whose next token is a piece of the image
    if labels == "data":
        expected[-1] = True  # what follows the last token is not known
    assert torch.equal(silent, expected.expand(2, -1))
    everywhere = Loss(labels=labels, seed=5, vocab_size=320)
    other, more = everywhere.gradient(lambda x: x @ head, hidden, batch)
    assert torch.equal(other[:, ~expected], gradient[:, ~expected])
    assert value < more


def test_a_gradient_that_does_not_arrive_is_an_error(directory: Path, probed: Probed) -> None:
    block_pass = BlockBackward(probed.runner, 1, FORMATS_USED, probed.candidates[1].tensors)
    hidden = torch.randn(1, 8, probed.runner.layout.hidden_size)
    calibration = CalibrationSet(tokens=random_tokens(1, 8), holdout=torch.zeros(1, dtype=torch.bool))
    (batch,) = calibration.batches(1)
    backward(block_pass, hidden, torch.zeros_like(hidden), batch)
    with pytest.raises(InputError, match="no gradient reaches it"):
        block_pass.finish(Split.of(calibration))
