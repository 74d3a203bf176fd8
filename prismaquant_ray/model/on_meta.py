"""A transformers model without weights, and where its decoder is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prismaquant_ray.errors import InputError
from prismaquant_ray.model.experts import IMPLEMENTATION, register
from prismaquant_ray.source.config_json import with_numbers


def configured(body: Mapping[str, Any], where: str) -> Any:
    """transformers' configuration object of a config.json; InputError when transformers does not know or take it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    model_type = body.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{where}: transformers does not know model_type {model_type!r}; update transformers or check config.json"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(with_numbers(body))
    # Configurations check themselves, some by exceptions of Python's own.
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: transformers does not accept config.json: {text}") from error


def build_on_meta(config: Any, architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model with meta parameters and real non-persistent buffers (rotary tables, embedding scales).

    Some buffers are rounded to `dtype`, as transformers does when it loads a model in it.

    Raises:
        InputError: transformers has no such class for this configuration, or the class needs another package.
    """
    import transformers
    from transformers import PreTrainedModel

    model_class = getattr(transformers, architecture, None)
    if model_class is None or not isinstance(config, getattr(model_class, "config_class", None) or ()):
        raise InputError(f"transformers has no class {architecture} for model_type {config.model_type!r}")
    register()
    with torch.device("meta"):
        routed = {"experts_implementation": IMPLEMENTATION} if model_class._can_set_experts_implementation() else {}
        try:
            model = model_class._from_config(config, dtype=dtype, **routed)
        except ImportError as error:
            raise InputError(
                f"{architecture} needs a package that is not installed ({' '.join(str(error).split())[:200]}); install "
                "it here and on every worker"
            ) from error
    model.eval()
    _fill_buffers(model, model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__class__ = _placed(type(module))  # type: ignore[arg-type]
    return model


@functools.cache
def _placed(kind: Any) -> Any:
    """The class of a model, of which some ask for its `device` and put tensors there: that of its weights is none."""
    own = {"place": torch.device("meta"), "device": property(lambda self: self.place)}
    return type(kind.__name__, (kind,), {**own, "__module__": kind.__module__, "__qualname__": kind.__qualname__})


def place(model: nn.Module, device: torch.device) -> None:
    """Have a model that was built here say that it is on a device."""
    for module in model.modules():
        if "device" in type(module).__dict__:
            module.__dict__["place"] = device


def _fill_buffers(module: Any, owner: Any) -> bool:
    """Fill non-persistent buffers as transformers does; whether there were any in the module.

    transformers has the nearest enclosing model initialize every module, inner ones first: some fill the buffers of
    modules inside them.
    """
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        owner = module
    inside = [_fill_buffers(child, owner) for child in module.children()]
    meta = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
    volatile = [name for name in meta if name in module._non_persistent_buffers_set]
    for name in volatile:
        buffer = torch.zeros_like(getattr(module, name), device="cpu")
        # NaN shows up in the first hidden state if the model does not fill the buffer itself.
        setattr(module, name, buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer)
    if volatile or any(inside):
        owner._init_weights(module)
        return True
    return False


def decoder_layers(model: Any, config: Any) -> str:
    """Path of the decoder's list of layers, for an architecture without a family.

    Raises:
        InputError: there is no decoder alone, or no list of layers in it.
    """
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} has an encoder before its decoder, which is not supported; use a decoder-only model")
    decoder = model.get_decoder()
    if decoder is model.get_output_embeddings():
        decoder = model.base_model  # some call their head so
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    within = f"{prefix}." if prefix else ""
    lists = {
        f"{within}{path}": len(module) for path, module in decoder.named_modules() if isinstance(module, nn.ModuleList)
    }
    if not lists:
        raise InputError(f"{name} has no list of layers, so it cannot be loaded block by block")
    wanted = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    return next((path for path, count in lists.items() if count == wanted), max(lists, key=lambda path: lists[path]))
