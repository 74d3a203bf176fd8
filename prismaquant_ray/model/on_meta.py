"""A transformers model without weights, and where its decoder is."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from prismaquant_ray.errors import InputError, PrismaquantError
from prismaquant_ray.model.experts import IMPLEMENTATION, register
from prismaquant_ray.source.config_json import absurd_size, with_numbers

# Far more than any model has: experts are packed.
_MOST_PARAMETERS = 1 << 16
# Rotary tables and masks have a thousandth of it.
_LARGEST_BUFFER = 1 << 28


def configured(body: Mapping[str, Any], where: str) -> Any:
    """transformers' configuration object of a config.json; InputError when transformers does not know or take it."""
    from transformers import CONFIG_MAPPING

    model_type = body.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{where}: transformers does not know model_type {model_type!r}; update transformers or check config.json"
        )
    absurd = absurd_size(body)
    if absurd is not None:
        raise InputError(f"{where}: config.json has {absurd}, which no model has; fetch it again")
    with taken_by_transformers(where):
        return CONFIG_MAPPING[model_type].from_dict(with_numbers(body))


@contextmanager
def taken_by_transformers(where: str) -> Iterator[None]:
    """Inside the with-block only transformers works, on a config.json; InputError where it fails."""
    try:
        yield
    except PrismaquantError:
        raise
    except Exception as error:
        # Configurations and models check values by any exception, or stumble over them: the file is what is wrong.
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
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
        raise InputError(
            f"transformers has no class {architecture!r} for model_type {config.model_type!r}, which config.json names"
        )
    register()
    with torch.device("meta"):
        routed = {"experts_implementation": IMPLEMENTATION} if model_class._can_set_experts_implementation() else {}
        with taken_by_transformers(architecture), _bounded():
            try:
                model = model_class._from_config(config, dtype=dtype, **routed)
            except ImportError as error:
                raise InputError(
                    f"{architecture} needs a package that is not installed ({' '.join(str(error).split())[:200]}); "
                    "install it here and on every worker"
                ) from error
    model.eval()
    with taken_by_transformers(architecture):
        _fill_buffers(model, model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__class__ = _placed(type(module))  # type: ignore[arg-type]
    return model


@contextmanager
def _bounded() -> Iterator[None]:
    """Inside the with-block a model may have so many parameters, and no more: building them takes time."""
    left = _MOST_PARAMETERS

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise InputError(f"config.json describes a model of more than {_MOST_PARAMETERS:,} parameters; correct it")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


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
    huge = next((name for name in volatile if getattr(module, name).nbytes > _LARGEST_BUFFER), None)
    if huge is not None:
        raise InputError(f"config.json asks for a table {huge} of {getattr(module, huge).nbytes:,} bytes; correct it")
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
