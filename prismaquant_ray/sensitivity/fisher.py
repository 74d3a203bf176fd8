"""Labels and the gradient of the loss at the model's exit.

With labels sampled from the model's own prediction, E[∇L ∇Lᵀ] is the Fisher information, which is the Hessian of
KL(original ‖ perturbed) at the original (Martens, arXiv 1412.1193, section 5). With labels from the data it is the
empirical Fisher. L is the sum of token losses, so nothing is divided by batch sizes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prismaquant_ray.models.runner import ModelRunner

Labels = Literal["sampled", "data"]
IGNORED = -100
#: Logits of one piece: the head's cost in memory does not grow with the microbatch.
LOGIT_BYTES = 1 << 26


def exit_gradient(
    runner: ModelRunner, hidden: Tensor, tokens: Tensor, *, labels: Labels, seed: int, first_sequence: int
) -> tuple[Tensor, float]:
    """∂L/∂hidden (sequences, tokens, H) for what left the last block, and the summed loss in nats.

    tokens (sequences, tokens) are the inputs. Sampling draws one uniform per token from a generator seeded by
    (seed, index of the sequence in the calibration set), so neither microbatches nor workers change a label.
    """
    gradient = torch.empty_like(hidden)
    loss_sum = 0.0
    for row in range(hidden.shape[0]):
        uniform = torch.from_numpy(np.random.default_rng((seed, first_sequence + row)).random(hidden.shape[1]))
        following = torch.cat([tokens[row, 1:], torch.tensor([IGNORED])]).to(hidden.device)
        step = max(1, LOGIT_BYTES // (4 * runner.layout.vocab_size))
        for start in range(0, hidden.shape[1], step):
            piece = hidden[row : row + 1, start : start + step].detach().requires_grad_()
            with torch.enable_grad():
                logits = runner.logits(piece)[0].to(torch.float32)
            if labels == "sampled":
                target = sample(logits.detach(), uniform[start : start + step].to(hidden.device))
            else:
                target = following[start : start + step]
            with torch.enable_grad():
                loss = F.cross_entropy(logits, target, reduction="sum", ignore_index=IGNORED)
            (gradient[row : row + 1, start : start + step],) = torch.autograd.grad(loss, piece)
            loss_sum += float(loss.detach())
    return gradient, loss_sum


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Labels (tokens,) by inversion of the cumulative distribution; logits (tokens, V), uniform (tokens,) in [0, 1)."""
    cumulative = torch.softmax(logits, dim=-1).cumsum(-1)
    # Scaled by the total, which rounding leaves a little off 1.
    position = (uniform.to(cumulative.dtype) * cumulative[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative, position, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
