"""What a run will need, from its layout alone: memory of a worker, disk of the run store and the repository."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from prismaquant_ray.config import Config
from prismaquant_ray.formats import FORMATS, FormatName, codecs_of
from prismaquant_ray.layout import Block, Layout
from prismaquant_ray.rounding.forward_pass import hessian_bytes

# torch, transformers, Ray's worker and the calibration tokens of one process.
BASE_BYTES = 700_000_000
# Logits of one piece, their softmax, its cumulative sum and their gradient.
_EXIT_BYTES = 6 * (1 << 26)


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes. `worker_*` are parts of one worker's peak, which `worker` sums up; disk figures are for the whole run."""

    worker_base: int
    worker_weights: int
    worker_hessians: int
    worker_candidates: int
    worker_activations: int
    run_store: int
    repository: int

    @property
    def worker(self) -> int:
        """Peak of one worker."""
        return sum(value for name, value in asdict(self).items() if name.startswith("worker_"))

    def as_dict(self) -> dict[str, int]:
        """Every figure, by name."""
        return {**asdict(self), "worker": self.worker}


def needs(layout: Layout, config: Config, *, repository_bytes: int) -> Needs:
    """The plan `inspect` prints and a run is checked against."""
    compute = 4 if config.model.dtype == "float32" else 2
    tokens = config.calibration.microbatch * config.calibration.length
    boundary = config.calibration.sequences * config.calibration.length * layout.hidden_size * compute
    block = max(layout.blocks, key=lambda block: block.source_bytes)
    parameters = sum(linear.parameters for linear in block.linears)
    codecs = len(codecs_of(config.formats))
    widest = max(group.in_features for b in layout.blocks for group in b.inputs)
    # Inputs and outputs of every Linear are held until gradients arrive, with the rounded input and one error.
    per_token = sum(linear.in_features + 2 * linear.out_features for linear in block.linears) + 4 * widest
    head = layout.vocab_size * layout.hidden_size * compute
    weights = parameters * compute + block.source_bytes
    return Needs(
        worker_base=BASE_BYTES,
        worker_weights=max(weights, head),
        worker_hessians=sum(hessian_bytes(group) for group in block.inputs) + 3 * 4 * widest**2,
        worker_candidates=codecs * parameters * 4,
        worker_activations=max(tokens * per_token * 4, _EXIT_BYTES) + 4 * tokens * layout.hidden_size * compute,
        run_store=(len(layout.blocks) + 3) * boundary + candidate_bytes(layout.blocks, config.formats),
        repository=repository_bytes,
    )


def candidate_bytes(blocks: Sequence[Block], formats: Sequence[FormatName]) -> int:
    """Bytes of every stored candidate."""
    total = 0
    for block in blocks:
        for linear in block.linears:
            for name in formats:
                spec = FORMATS[name]
                if spec.codec is not None and spec.refusal(linear.out_features, linear.in_features) is None:
                    total += spec.weight_bytes(linear.out_features, linear.in_features) + spec.extra_bytes()
    return total
