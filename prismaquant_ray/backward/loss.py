"""Labels and the gradient of the loss at the model's exit.

With labels sampled from the model's own prediction, E[∇L ∇Lᵀ] is the Fisher information, which is the Hessian of
KL(original ‖ perturbed) at the original (Martens, arXiv 1412.1193, section 5). With labels from the data it is the
empirical Fisher. L is the sum of token losses, so nothing is divided by batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prismaquant_ray.calibration.dataset import Batch

Labels = Literal["sampled", "data"]
IGNORED = -100
#: Logits of one piece: the head's cost in memory does not grow with the microbatch.
LOGIT_BYTES = 1 << 26
#: The same on a GPU, which reads the whole head for every piece, from a memory much slower than its products.
GPU_LOGIT_BYTES = 1 << 29
#: Random streams of the labels of one sequence: those of the model, and of its draft head.
MODEL, DRAFT = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loss:
    """Cross-entropy against labels of one kind.

    `vocab_size` and `logit_bytes` bound a piece; positions that predict `image_token`, a placeholder for images, have
    no loss.
    """

    labels: Labels
    seed: int
    vocab_size: int
    image_token: int | None = None
    logit_bytes: int = LOGIT_BYTES

    @property
    def piece(self) -> int:
        """Positions whose logits are computed at a time."""
        return max(1, self.logit_bytes // (4 * self.vocab_size))

    def gradient(
        self, logits_of: Callable[[Tensor], Tensor], hidden: Tensor, batch: Batch, *, stream: int = MODEL
    ) -> tuple[Tensor, float]:
        """∂L/∂hidden (sequences, tokens, H) where `logits_of` hidden (1, n, H) are (1, n, V), and the loss in nats."""
        gradient = torch.empty_like(hidden)
        # Not as a number: the host would have to wait for every piece.
        loss_sum = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for row, where, targets in self.pieces(hidden.shape[1], batch, stream, device=hidden.device):
            piece = hidden[row : row + 1, where].detach().requires_grad_()
            with torch.enable_grad():
                logits = logits_of(piece)
            at_logits, loss = targets.gradient(logits[0].detach())
            (gradient[row : row + 1, where],) = torch.autograd.grad(logits, piece, at_logits.unsqueeze(0))
            loss_sum += loss
        return gradient, float(loss_sum)

    def pieces(
        self, tokens: int, batch: Batch, stream: int = MODEL, *, device: torch.device
    ) -> Iterator[tuple[int, slice, PieceLoss]]:
        """Sequence, positions and loss of every piece, for the first `tokens` positions of each sequence.

        Position t predicts token t+1, or t+2 in the stream of the draft head. Sampling draws one uniform per token
        from a generator seeded by (seed, index of the sequence in the calibration set[, stream]), so neither
        microbatches nor workers change a label.
        """
        ahead = 1 + stream
        for row, ids in enumerate(batch.tokens):
            seeds = (self.seed, batch.first_sequence + row) + ((stream,) if stream else ())
            uniform = torch.from_numpy(np.random.default_rng(seeds).random(tokens))
            following = torch.cat([ids[ahead:].cpu(), torch.full((ahead,), IGNORED)])[:tokens]
            following, uniform = (_moved(tensor, device) for tensor in (following, uniform))
            for start in range(0, tokens, self.piece):
                where = slice(start, min(start + self.piece, tokens))
                yield row, where, PieceLoss(self, following[where], uniform[where])


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True, eq=False)
class PieceLoss:
    """The loss of one piece, for its logits (n, V), on their device."""

    loss: Loss
    following: Tensor
    uniform: Tensor

    def gradient(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """∂L/∂logits (n, V) of the summed cross-entropy, softmax − onehot(label), and the loss in nats, ()."""
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
        sampled = self.loss.labels == "sampled"
        target = sample(probabilities, self.uniform) if sampled else self.following
        if self.loss.image_token is not None:
            target = target.masked_fill(self.following == self.loss.image_token, IGNORED)
        # A label's probability may be 0 in float32; the largest never is.
        largest, likeliest = probabilities.max(-1, keepdim=True)
        label = target.clamp(min=0).unsqueeze(-1)
        behind = logits.gather(-1, likeliest).float() - logits.gather(-1, label).float()
        counted = (target != IGNORED).unsqueeze(-1)
        loss = torch.where(counted, behind - largest.log(), 0.0).sum()
        probabilities.scatter_add_(-1, label, torch.full_like(largest, -1.0))
        # Not a product with 0: rows that are not counted may hold NaN.
        return probabilities.masked_fill_(~counted, 0.0).to(logits.dtype), loss


def sample(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Labels (tokens,) by inversion of the cumulative distribution (tokens, V), for uniform (tokens,) in [0, 1)."""
    # CUDA scans a row by itself in parts whose order varies, and with them its sums; several rows are scanned alike.
    alone = len(probabilities) == 1 and probabilities.device.type != "cpu"
    cumulative = probabilities.expand(2, -1).cumsum(-1)[:1] if alone else probabilities.cumsum(-1)
    # Scaled by the total, which rounding leaves a little off 1.
    position = (uniform.to(cumulative.dtype) * cumulative[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative, position, right=True).squeeze(-1).clamp_(max=probabilities.shape[-1] - 1)
