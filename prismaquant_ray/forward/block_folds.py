"""The folds of a block while it is finished: their factors as they are chosen, and its weights as they then are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prismaquant_ray.factors import Equalization, Factors, factors_of
from prismaquant_ray.fold import Fold
from prismaquant_ray.formats.base import Format
from prismaquant_ray.forward.equalize import Reading, chosen_factors, representable
from prismaquant_ray.layout import InputGroup, Matrix

_ALL = slice(None)
# Weights in float32 at a time.
_AT_ONCE = 1 << 24


@dataclass(kw_only=True, eq=False)
class BlockFolds:
    """Folds of a loaded block, in the order in which their factors are chosen.

    `stored` is the type in which the checkpoint has each parameter, `quantizable` are those that may be quantized,
    `rounding` is the format that factors are chosen for.
    """

    module: nn.Module
    stored: dict[str, torch.dtype]
    quantizable: set[str]
    folds: Sequence[Fold]
    rounding: Format | None
    #: Folds whose factors are not all one, with their factors; `keep` adds one.
    chosen: list[tuple[Fold, Tensor]] = field(default_factory=list)
    # Mean square of what storing a folded weight in 16 bits changes, by Linear; of some experts after others.
    _squares: dict[str, list[Tensor]] = field(default_factory=dict)
    _factors: dict[str, Factors] = field(default_factory=dict)

    def keep(self, fold: Fold, s: Tensor) -> None:
        """Use these factors from now on."""
        self.chosen.append((fold, s))
        self._factors = factors_of(self.chosen)

    def of(self, group: InputGroup) -> Fold | None:
        """The fold that multiplies all readers of an input."""
        names = {name for matrix in group.matrices for name in matrix.parameters}
        return next((fold for fold in self.folds if names <= {member.parameter for member in fold.multiplied}), None)

    def choose(self, fold: Fold, reading: Reading) -> Tensor | None:
        """The best factors of a fold, as they can be stored: None where all are one."""
        assert self.rounding is not None
        if any(self.rounding.refusal(*weight.shape[-2:]) is not None for weight in reading.weights):
            return None
        touched = {member.parameter: member for member in (*fold.divided, *fold.multiplied)}
        norms = [m for m in fold.divided if m.axis == -1 and m.parameter.endswith("weight")]
        exact = set(touched) - self.quantizable - {member.parameter for member in norms}
        # A norm of 1 + w takes no powers of two: what stays is then rounded once.
        powers = bool(exact) and not any(member.shift for member in norms)
        s = chosen_factors(fold, reading, self.rounding, powers_of_two=powers)
        for member in norms:
            if s is None:
                break
            weight = self.module.get_parameter(member.parameter)
            s = representable(weight, s, self.stored[member.parameter], member.shift)
        return s

    def readers(self, fold: Fold, at: slice = _ALL) -> list[Tensor]:
        """Readers of a fold that may be quantized, (O, C); of experts with own factors the ones `at`, (E, O, C)."""
        factors = self._factors
        found: list[Tensor] = []
        for member in fold.multiplied:
            if member.parameter not in self.quantizable:
                continue
            weight: Tensor = self.module.get_parameter(member.parameter)
            if fold.experts is not None:
                found.append(weight[at])
                continue
            if member.parameter in factors:
                weight = factors[member.parameter].apply(weight, self.stored[member.parameter])
            found.append(weight.flatten(0, -2))
        return found

    def columns(self, group: InputGroup, more: Equalization = ()) -> Tensor | None:
        """What an input is divided by (I,), or by some experts (e, I)."""
        return self._with(more).get(group.matrices[0].parameters[0], Factors()).columns

    def weights(self, matrix: Matrix, at: slice, more: Equalization = ()) -> list[Tensor]:
        """Its Linears' weights (O, I), or (e, O, I) of the experts `at`, whose own factors are `more`. Call once."""
        factors = self._with(more)
        found: list[Tensor] = []
        for parameter in matrix.parameters:
            loaded = self.module.get_parameter(parameter)
            weight: Tensor = loaded if matrix.experts is None else loaded[at]
            squares = None
            if parameter in factors:
                weight, squares = self._folded(parameter, weight, factors[parameter])
                if matrix.experts is None:
                    # Nothing reads the source's any more: one of them is held.
                    loaded.data = weight
            # A packed parameter holds all of them, another its own.
            linears = zip(matrix.linears, matrix.rows, strict=True)
            own = [*linears] if matrix.experts is not None else [(matrix.linears[len(found)], _ALL)]
            for linear, rows in own:
                if squares is not None:
                    self._squares.setdefault(linear.name, []).append(squares[..., rows].mean(-1).reshape(-1))
                found.append(weight[..., rows, :])
        return found

    def _folded(self, parameter: str, weight: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
        """The weight with its factors; by row the mean square of what storing it in 16 bits changes of the source."""
        folded = torch.empty_like(weight)
        squares = torch.empty(weight.shape[:-1], device=weight.device)
        step = max(1, _AT_ONCE * weight.shape[-2] // weight.numel())
        for start in range(0, weight.shape[-2], step):
            rows = slice(start, start + step)
            own = factors.some_rows(rows)
            exact = own.apply(weight[..., rows, :].float(), torch.float32)
            folded[..., rows, :] = exact
            error = own.undo(exact.to(self.stored[parameter]).float().sub_(exact))
            squares[..., rows] = error.square_().mean(-1)
        return folded, squares

    def storing(self) -> dict[str, list[float]]:
        """Mean square of what storing a folded weight in 16 bits changes, by Linear; of experts of each."""
        joined = {name: torch.cat(parts) for name, parts in self._squares.items()}
        if not joined:
            return {}
        # The host waits once.
        values = torch.cat([*joined.values()]).cpu().split([len(each) for each in joined.values()])
        return {name: part.tolist() for name, part in zip(joined, values, strict=True)}

    def _with(self, more: Equalization) -> dict[str, Factors]:
        return factors_of([*self.chosen, *more]) if more else self._factors
