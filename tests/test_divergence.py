"""Claims about measured divergence."""

from __future__ import annotations

import math

import pytest
import torch

from prismaquant_ray.evaluation.divergence import summarize, token_kl


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)) * 20
    assert token_kl(logits, logits).tolist() == [0.0] * 5
    # Logits are defined up to a constant.
    torch.testing.assert_close(token_kl(logits, logits + 3), torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_kl_is_that_of_the_definition() -> None:
    p, q = (0.7, 0.2, 0.1), (0.5, 0.25, 0.25)
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = token_kl(torch.tensor([p]).log(), torch.tensor([q]).log())
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert float(token_kl(torch.tensor([q]).log(), torch.tensor([p]).log())) != pytest.approx(expected, rel=1e-2)


def test_the_summary_is_of_all_tokens() -> None:
    kl = torch.arange(101, dtype=torch.float64)
    found = summarize(kl, kl < 25)
    assert (found.tokens, found.kl_mean, found.kl_p90, found.kl_p99) == (101, 50.0, 90.0, 99.0)
    assert found.top1_agreement == pytest.approx(25 / 101)
