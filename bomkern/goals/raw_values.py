"""Convert raw values by name, as a `bomkern.GoalSet` takes them, to tensors; name the goal in errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_goals
from ..lazy_goals.lazy import Lazy

Raw = Mapping[str, "Tensor | Lazy | Mapping[str, Tensor | Lazy]"]


class RawValues:
    """Convert a mapping of raw values to the tensors of the columns, in order.

    Args:
        names: the goals.
        members: the members of each group.
        columns: the name of each tensor in errors.
    """

    def __init__(self, names: list[str], members: dict[str, list[str]], columns: list[str]) -> None:
        self.names, self.known, self.members, self.labels = names, set(names), members, columns

    def columns(self, raw: Raw) -> list[Tensor]:
        """Return the tensors of the columns. Raises KeyError or TypeError for a missing, unknown or invalid goal."""
        if not isinstance(raw, Mapping):
            raise TypeError(f"raw must be a mapping of goals' names to tensors, got {type(raw).__name__}")
        if raw.keys() != self.known:
            self._refuse("goal", raw, self.names)
        tensors: list[Any] = []
        for name in self.names:
            value = raw[name]
            if name not in self.members:
                tensors.append(value)
                continue
            if not isinstance(value, Mapping):
                raise TypeError(f"{name} is a Group: its raw value must be a mapping, got {type(value).__name__}")
            if value.keys() != set(self.members[name]):
                self._refuse(f"member of {name}", value, self.members[name])
            tensors += [value[member] for member in self.members[name]]
        return tensors

    @staticmethod
    def _refuse(what: str, given: Mapping[str, Any], known: list[str]) -> None:
        missing, unknown = [n for n in known if n not in given], [str(n) for n in given if n not in known]
        parts = [f"no raw value for {', '.join(missing)}"] * bool(missing)
        parts += [f"no {what} is called {', '.join(unknown)} (there are {', '.join(known)})"] * bool(unknown)
        raise KeyError("; ".join(parts))

    def explain(self, tensors: list[Tensor], device: torch.device) -> None:
        """Raise an error that names the goal, where that of the op named an index; return if nothing is wrong."""
        check_goals(tensors, [f"the raw value of {label}" for label in self.labels])
        given = tensors[0].device  # that of all
        if given != device:
            raise ValueError(f"the raw values are on {given}, the GoalSet on {device}: call goals.to({str(given)!r})")
