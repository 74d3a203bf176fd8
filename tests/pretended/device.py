"""Tensors that say cuda:0 and hold their data on the CPU, and a ledger of what they cost.

Inside `pretended_cuda()`, tensors that are made on or moved to "cuda" are `Pretended`. As on CUDA, an operation that
mixes them with tensors on the CPU raises (0-dim ones may mix), and their memory cannot be read in place. An operation
that is not a view counts as a launch, a place where the host waits for the device as a wait, by source line. Of the
operators that a GPU runs by kernels of its own, `launch` runs and is counted; results are the reference's.
`tests.pretended.guard.load` must have been called.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from prismaquant_ray.kernels import NAMESPACE, launcher

CUDA = torch.device("cuda", 0)
# Operations without a kernel whose schema does not say that they are views.
_MAKING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "lift_fresh_copy")
_NO_KERNEL = {*_MAKING, "_unsafe_view", "_reshape_alias", "set_", "resize_", "is_same_size", "is_pinned"}
# Kernels of an operation where they are more than one: lower bounds, from ATen's CUDA sources.
_KERNELS = {
    "sort": 4,
    "argsort": 4,
    "nonzero": 3,
    "bincount": 5,
    "repeat_interleave": 3,
    "linalg_cholesky_ex": 8,
    "_index_put_impl_": 6,
}
# Operations whose result, or its shape, the host must read.
_WAITS = {
    "_local_scalar_dense": "item",
    "equal": "equal",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "bincount": "bincount",
    "_unique2": "unique",
}
# Operations that take indices on the CPU, and copy them.
_INDEXED = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))


@dataclass(slots=True)
class Ledger:
    """Launches by source line; waits by kind and source line; bytes copied by direction and source line."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    copied: Counter[tuple[str, str]] = field(default_factory=Counter)
    #: Whether the device may still be at work.
    busy: bool = False

    def clear(self) -> None:
        """Begin again."""
        for counts in (self.launches, self.waits, self.copied):
            counts.clear()

    def launch(self, count: int = 1) -> None:
        """The device gets something to do."""
        self.launches[_place()] += count
        self.busy = True

    def wait(self, kind: str) -> None:
        """The host waits until all is done."""
        self.waits[kind, _place()] += 1
        self.busy = False

    def synchronize(self) -> None:
        """The host waits if there is anything to wait for."""
        if self.busy:
            self.wait("synchronize")


LEDGER = Ledger()
_pinned: set[int] = set()


class Pretended(Tensor):
    """A tensor on cuda:0 whose data is `held`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        wrapper: Pretended = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=CUDA,
        )
        wrapper.held = held
        return wrapper

    # Modules that move to the device ask for these, and swap their parameters.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], *_: Any) -> Pretended:
        return Pretended(inner["held"])

    def __repr__(self) -> str:
        return f"Pretended({self.held!r})"

    @property
    def data(self) -> Tensor:
        """As of any tensor."""
        return self.detach()

    @data.setter
    def data(self, value: Pretended) -> None:
        assert value.shape == self.shape
        self.held = value.held

    def untyped_storage(self) -> Any:
        """Whose views share it, as on a device."""
        return self.held.untyped_storage()

    def tolist(self) -> list[Any]:
        """The values, read by the host."""
        LEDGER.wait("tolist")
        found: list[Any] = self.held.tolist()
        return found

    def numpy(self, **_: Any) -> Any:
        """Refused as CUDA does."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, tuple(args), dict(kwargs or {}))


class _Factories(TorchDispatchMode):
    """What has no argument on the device yet: factories, and moves there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Operations made of others come as they are below autograd, where `_launch` is.
        with self:
            composed = func.decompose(*args, **(kwargs or {}))
        if composed is not NotImplemented:
            return composed
        return _run(func, tuple(args), dict(kwargs or {}))


class _Zeroing(_Factories):
    """Memory is zero: no kernel fills it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if func._schema.name in ("aten::empty", "aten::empty_like"):
            found.held.zero_()
        return found


@contextmanager
def pretended_cuda() -> Iterator[Ledger]:
    """The device exists inside the with-block."""
    LEDGER.clear()
    with (
        patch.object(torch, "tensor", _moving(torch.tensor)),
        patch.object(torch, "as_tensor", _moving(torch.as_tensor)),
        patch.object(torch.Tensor, "pin_memory", _pin),
        # What the device computes is computed by the host's threads, and sums depend on their number.
        patch("actors.worker.share_of_cores", lambda: 1),
        patch.object(torch.cuda, "_lazy_init", lambda: None),
        patch.object(torch.cuda, "get_device_name", lambda *_: "a pretended card"),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        patch.object(torch.cuda, "mem_get_info", lambda *_: (80 * 10**9, 80 * 10**9)),
        patch.object(torch.cuda, "max_memory_allocated", lambda *_: 0),
        patch.object(torch.cuda, "reset_peak_memory_stats", lambda *_: None),
        patch.object(torch.cuda, "set_sync_debug_mode", lambda _: None),
        patch.object(torch.cuda, "current_stream", _Stream),
        patch.object(torch.cuda, "Stream", _Stream),
        patch.object(torch.cuda, "Event", _Event),
        patch.object(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(is_integrated=False)),
        patch.object(torch.cuda, "stream", lambda _: nullcontext()),
        patch.object(Pretended, "record_stream", lambda *_: None),
        _Factories(),
    ):
        yield LEDGER


class _Stream:
    """Of the device, whose work is done in order."""

    def __init__(self, _: Any = None) -> None: ...

    def wait_stream(self, other: _Stream) -> None:
        """Nothing to do."""

    def synchronize(self) -> None:
        """The host waits for the device."""
        LEDGER.synchronize()


class _Event:
    """Of a stream, which is done by the time the host asks. Between any two lies a millisecond."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, _: _Stream | None = None) -> None:
        """Nothing to do."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, _: _Event) -> float:
        """Milliseconds."""
        return 1.0


def _moving(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor and the like build their result below every mode; here on the CPU, then it is moved: as they do."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(data, Pretended):
            moved = make(data.held, *args, **kwargs)
            return Pretended(moved) if device is None else Pretended(moved).to(device)
        found = make(tree_map_only(Pretended, lambda tensor: tensor.item(), data), *args, **kwargs)
        return found if device is None else found.to(device)

    return made


def _pin(tensor: Tensor, *_: Any) -> Tensor:
    copy = torch.empty_like(tensor).copy_(tensor)
    _pinned.add(copy.untyped_storage().data_ptr())
    return copy


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on the held data, counted as CUDA would run it."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.device.type == "cpu"]
    wanted = kwargs.get("device")
    to_cuda = wanted is not None and torch.device(wanted).type == "cuda"
    if not there and not to_cuda:
        return _on_cpu(func, args, kwargs)
    held_args, held_kwargs = tree_map_only(Pretended, lambda tensor: tensor.held, (args, kwargs))
    if to_cuda:
        held_kwargs["device"] = torch.device("cpu")
    if name == "_to_copy" and wanted is not None and bool(there) != to_cuda:
        moved = func(*held_args, **held_kwargs)
        _count_copy(tensors[0], moved, asynchronous=bool(kwargs.get("non_blocking")))
        return Pretended(moved) if to_cuda else moved
    if name == "copy_" and len(there) == 1:
        _count_copy(args[1], args[0], asynchronous=len(args) > 2 and args[2])
        func(*held_args, **held_kwargs)
        return args[0]
    _check_devices(name, here, there)
    _check_division(name, args)
    if func.namespace == NAMESPACE:
        _launch(name.partition("::")[2], args)
    else:
        _count(func, name, args, here)
    if wanted is not None and not to_cuda:
        return _on_cpu(func, held_args, held_kwargs)
    if func is torch.ops.aten.mm.dtype:
        # A CPU has it in one type only.
        held_args, func = tuple(held.to(args[2]) for held in held_args[:2]), torch.ops.aten.mm.default
    found = func(*held_args, **held_kwargs)
    written = _written(func, args, kwargs)
    return tree_map_only(Tensor, lambda held: written[id(held)] if id(held) in written else Pretended(held), found)


def _on_cpu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation whose result is on the CPU, in pinned memory if that is wanted: which no CPU has."""
    pinned = kwargs.pop("pin_memory", False)
    made = func(*args, **kwargs)
    if pinned:
        _pinned.add(made.untyped_storage().data_ptr())
    return made


class _Kernel:
    """In place of a Triton kernel: counts, and writes nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(1 <= size < 2**31 for size in grid[:1])
        assert all(1 <= size < 2**16 for size in grid[1:])
        return self._launched

    @staticmethod
    def _launched(*args: Any, **_: Any) -> None:
        assert all(not isinstance(arg, Tensor) or isinstance(arg, Pretended) for arg in args), "a tensor on the CPU"
        assert all(not isinstance(arg, Tensor) or arg.is_contiguous() for arg in args)
        LEDGER.launch()


def _launch(operator: str, args: tuple[Any, ...]) -> None:
    """Do what a GPU does for an operator, but for its kernels."""
    launch = launcher(operator)
    module = vars(sys.modules[launch.__module__])
    kernels = {name: _Kernel() for name in module if name.endswith("_kernel")}
    # Some write to what they are given, which the reference is to do.
    copies = tree_map_only(Pretended, lambda tensor: Pretended(tensor.held.clone()), args)
    with patch.dict(module, kernels), _Zeroing():
        launch(*copies)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, Pretended]:
    """What an operation writes to and returns, by the identity of the held data."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    return {
        id(value.held): value
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for value in [given.get(argument.name)]
        if isinstance(value, Pretended)
    }


def _check_devices(name: str, here: Sequence[Tensor], there: Sequence[Tensor]) -> None:
    beside = [tuple(tensor.shape) for tensor in here if tensor.dim() > 0]
    if there and beside and name not in _INDEXED:
        problem = f"Expected all tensors to be on the same device, but found cuda:0 and cpu {beside}"
        raise RuntimeError(f"aten.{name}: {problem} ({_place()})")


def _check_division(name: str, args: tuple[Any, ...]) -> None:
    """CUDA multiplies by the reciprocal of a number, which rounds twice if it is not a power of two."""
    number = args[1] if name in ("div", "div_") and not isinstance(args[1], Pretended) else 1.0
    if math.frexp(float(number))[0] != 0.5 and _place().startswith("prismaquant_ray/formats/"):
        raise RuntimeError(f"aten.{name}: not the CPU's bits: a division by {number} ({_place()})")


def _count_copy(source: Tensor, target: Tensor, *, asynchronous: bool) -> None:
    to_host = isinstance(source, Pretended)
    way = "to the host" if to_host else "to the device"
    LEDGER.copied[way, _place()] += source.nbytes
    if asynchronous and (target if to_host else source).untyped_storage().data_ptr() in _pinned:
        LEDGER.busy = True
    else:
        LEDGER.wait(f"copy {way}")


def _count(func: Any, name: str, args: tuple[Any, ...], here: Sequence[Tensor]) -> None:
    if name in _WAITS:
        LEDGER.wait(_WAITS[name])
    if name in _INDEXED:
        if here:
            LEDGER.wait("index on the host")
        # Filling by a mask with one value is masked_fill; every other mask becomes indices, whose number is read.
        filled = name != "index" and args[2].numel() == 1
        if not filled and any(isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1]):
            LEDGER.wait("mask")
    if not (func.is_view or name in _NO_KERNEL):
        LEDGER.launch(_KERNELS.get(name, 1))


def _place() -> str:
    """The innermost line of this project, as file:line function."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        for package in ("prismaquant_ray/", "actors/"):
            if f"/{package}" in file and "/tests/" not in file:
                return f"{file[file.rindex(package) :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"
