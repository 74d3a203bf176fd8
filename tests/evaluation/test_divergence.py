"""Claims about measured divergence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prismaquant_ray.evaluation.divergence import SourceLogits, TokenFigures, summarize

NONE = -100


def random_logits(tokens: int, seed: int, scale: float = 5.0) -> Tensor:
    return torch.randn(tokens, 11, generator=torch.Generator().manual_seed(seed)) * scale


def kl_of(source: Tensor, quantized: Tensor) -> Tensor:
    return SourceLogits(source, torch.zeros(len(source), dtype=torch.long)).against(quantized).kl


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = random_logits(5, 0, 20.0)
    found = SourceLogits(logits, torch.arange(5)).against(logits)
    assert found.kl.tolist() == [0.0] * 5
    assert bool(found.agrees.all())
    # Logits are defined up to a constant.
    torch.testing.assert_close(kl_of(logits, logits + 3), torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_kl_is_that_of_the_definition() -> None:
    p, q = (0.7, 0.2, 0.1), (0.5, 0.25, 0.25)
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    logits = torch.tensor([p]).log(), torch.tensor([q]).log()
    assert float(kl_of(*logits)) == pytest.approx(expected, rel=1e-6)
    assert float(kl_of(*reversed(logits))) != pytest.approx(expected, rel=1e-2)
    found = SourceLogits(logits[0], torch.tensor([2])).against(logits[1])
    assert float(found.kl) == pytest.approx(expected, rel=1e-6)
    assert float(found.loss) == pytest.approx(-math.log(q[2]), rel=1e-6)


@given(seeds=st.tuples(st.integers(0, 99), st.integers(100, 199)), scale=st.floats(0.1, 50.0))
def test_figures_of_a_piece_are_those_of_its_definitions(seeds: tuple[int, int], scale: float) -> None:
    source, quantized = (random_logits(7, seed, scale) for seed in seeds)
    following = torch.tensor([0, 3, 10, NONE, 5, 5, 1])
    found = SourceLogits(source, following).against(quantized)
    log_p, log_q = (torch.log_softmax(logits.double(), -1) for logits in (source, quantized))
    torch.testing.assert_close(found.kl, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-9, atol=1e-9)
    assert found.agrees.tolist() == (source.argmax(-1) == quantized.argmax(-1)).tolist()
    expected = torch.nn.functional.cross_entropy(quantized.double(), following, reduction="none", ignore_index=NONE)
    torch.testing.assert_close(found.loss.nan_to_num(0.0), expected, rtol=1e-9, atol=1e-9)
    assert found.loss.isnan().tolist() == (following == NONE).tolist()


def test_the_summary_is_of_all_tokens() -> None:
    kl = torch.arange(101, dtype=torch.float64)
    loss = torch.full((101,), 2.0, dtype=torch.float64)
    loss[[5, 50]] = math.nan
    found = summarize(TokenFigures(kl, kl < 25, loss), torch.zeros(101, dtype=torch.long))
    assert (found.tokens, found.kl_mean, found.kl_p90, found.kl_p99) == (101, 50.0, 90.0, 99.0)
    assert found.top1_agreement == pytest.approx(25 / 101)
    assert (found.loss, found.perplexity) == (2.0, pytest.approx(math.exp(2.0)))
    assert found.kl_standard_error == 0.0, "one sequence says nothing of others"


@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_the_standard_error_takes_sequences_as_the_samples(lengths: list[int], seed: int) -> None:
    """By jackknife: what the mean would be without each sequence."""
    kl = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    found = summarize(TokenFigures(kl, kl > 0, kl), sequence)
    left_out = torch.stack([kl[sequence != index].mean() for index in range(len(lengths))])
    n = len(lengths)
    expected = math.sqrt((n - 1) / n * float((left_out - left_out.mean()).square().sum()))
    assert found.kl_standard_error == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if len(set(lengths)) == 1:
        means = kl.view(n, -1).mean(-1)
        assert expected == pytest.approx(float(means.std() / math.sqrt(n)), rel=1e-9)


@given(values=st.lists(st.floats(0, 10), min_size=1, max_size=40))
def test_percentiles_are_torchs(values: list[float]) -> None:
    kl = torch.tensor(values, dtype=torch.float64)
    found = summarize(TokenFigures(kl, kl > 0, kl), torch.zeros(len(kl), dtype=torch.long))
    assert found.kl_p90 == pytest.approx(float(kl.quantile(0.90)), rel=1e-12)
    assert found.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-12)
