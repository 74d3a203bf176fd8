"""Statistics of a Linear's input over the calibration set: what rounding needs to know of the data.

X is the input of one input group, (tokens, I). Training tokens drive scale search and GPTQ; held-out tokens
decide whether GPTQ is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InputStatistics:
    """Sums over tokens: `train` and `holdout` are Σ x xᵀ (I, I) float32; `amax` is max |x| over all tokens.

    Adding microbatches in a fixed order gives the same bits however the work is spread.
    """

    train: Tensor
    holdout: Tensor
    train_tokens: int
    holdout_tokens: int
    amax: float

    @classmethod
    def empty(cls, in_features: int, device: torch.device) -> InputStatistics:
        """No tokens seen."""
        zeros = torch.zeros(in_features, in_features, device=device)
        return cls(train=zeros, holdout=zeros.clone(), train_tokens=0, holdout_tokens=0, amax=0.0)

    def plus(self, x: Tensor, held_out: Tensor) -> InputStatistics:
        """With a microbatch x (sequences, tokens, I) added; `held_out` (sequences,) bool.

        The sums are updated in place, so the receiver must not be used again.
        """
        train = x[~held_out].flatten(0, 1).to(torch.float32)
        holdout = x[held_out].flatten(0, 1).to(torch.float32)
        return InputStatistics(
            train=self.train.addmm_(train.T, train),
            holdout=self.holdout.addmm_(holdout.T, holdout),
            train_tokens=self.train_tokens + train.shape[0],
            holdout_tokens=self.holdout_tokens + holdout.shape[0],
            amax=max(self.amax, float(x.abs().max())),
        )

    @property
    def importance(self) -> Tensor:
        """E[x²] per column (I,) over training tokens."""
        return self.train.diagonal() / max(self.train_tokens, 1)


def output_error(delta: Tensor, hessian: Tensor) -> Tensor:
    """Per output row (O,): Σ_t (ΔW x_t)² = diag(ΔW H ΔWᵀ), for ΔW (O, I) and H = Σ x xᵀ."""
    return ((delta @ hessian) * delta).sum(-1)
