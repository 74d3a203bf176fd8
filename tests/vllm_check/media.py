"""Image libraries in an environment made for the CPU: what of them works is made to work, the rest is hidden."""

from __future__ import annotations

import importlib
import sys

import torch

#: operators that torchvision's Python code refers to when it is imported, and that nothing here calls
_OPERATORS = ("nms", "qnms")
_KEPT: list[torch.library.Library] = []


def prepare() -> None:
    """Make torchvision importable, which vLLM's vision models need, and hide audio and video.

    Packages built for CUDA get installed beside a torch without it: their extensions cannot be loaded. torchvision's
    resizing, all that is needed here, is written in Python; torchaudio and torchcodec have no use at all.
    """
    for name in ("torchaudio", "torchcodec"):
        sys.modules[name] = None  # type: ignore[assignment]  # for importlib: not installed
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return  # language models do without
    except RuntimeError:
        _declare_operators()
        importlib.import_module("torchvision")


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
