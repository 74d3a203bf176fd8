"""Bytes of a checkpoint's tensors, as the writer copies them."""

from __future__ import annotations

from prismaquant_ray.source.checkpoint import Checkpoint


def bytes_of(checkpoint: Checkpoint, name: str) -> bytes:
    """A tensor's bytes, by ranged requests to whatever holds them."""
    holder, info = checkpoint.piece(name)
    (data,) = holder.get_ranges(info.file, [(info.start, info.stop)])
    return bytes(data)
