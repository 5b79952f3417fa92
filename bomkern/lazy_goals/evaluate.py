"""`Evaluation`: the lazy goals of one loss, from their functions to the gradient of the rows that own their sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..common.devices import rng_state, set_rng_state
from ..common.process_group import several_ranks
from .call import HALF, Call, check_rows, is_rows
from .cost import fraction_of, partial_pays, record_owned, statistics_of
from .joint_calls import autocast_of, join_rows, plan_calls, sorted_nodes
from .node import Node
from .owned_rows import attach_rows


class Evaluation:
    """The evaluation of the lazy goals of one loss, and of all lazies that these read.

    The methods stand in the order of a step:

    1. `tensors` calls `look`, which evaluates all rows without a graph. The caller computes the loss of these values.
    2. `attach` reads from the gradient of the loss which rows own their sample.
    3. `choose` finds the rows for which each function is needed.
    4. `rebuild` evaluates those rows with a graph, and `attach` connects them to the loss.

    Where rows must not be left out, or leaving them out does not pay, `tensors` calls `build` instead, which evaluates
    all rows once, with a graph. Where the rows are known before the loss, `nested` or `masked` finds what each function
    needs, and `rows_of_goals` evaluates it once, in place of all four.

    Args:
        goals: the goals of the loss. Those that are not lazy are passed on unchanged.

    Attributes:
        nodes: the lazies, each after those that it reads. Rows and graphs are kept by index into this list.
        walked: after `attach`, the fraction of the lazies' backward that will run, weighted by measured times.
    """

    def __init__(self, goals: Sequence[Any]) -> None:
        self.goals = list(goals)
        self.nodes = sorted_nodes([goal for goal in goals if isinstance(goal, Node)])
        self.walked = 1.0
        self._index = {node: i for i, node in enumerate(self.nodes)}
        # The index of each argument that is one of the nodes. The arguments of a lazy with a graph need not be nodes.
        self._sources = [[self._index.get(a) if isinstance(a, Node) else None for a in n.args] for n in self.nodes]
        self._calls, self._starts = plan_calls(self.nodes)
        self._partial = False
        self._parts: dict[int, Tensor] = {}  # the rows with a graph of each node, after `attach`
        self._watched: dict[int, Tensor] = {}  # the values of the goals whose owned rows `attach` asks for

    def tensors(self, partial: bool, always: bool) -> list[Any]:
        """Evaluate the lazy goals, and return all goals as the loss takes them.

        Args:
            partial: whether rows may be left out of the graphs.
            always: whether they are left out even if that costs more time.

        Raises:
            ValueError: a lazy goal does not return [n] for n rows.
        """
        grad = torch.is_grad_enabled()
        self._partial = partial and grad and (always or self._pays())
        if self._partial or not grad:
            self.look()
        else:
            self.build()
        indices = dict.fromkeys(self._index[goal] for goal in self.goals if isinstance(goal, Node))
        values = {i: self._goal(self.nodes[i]) for i in indices}
        # With partial graphs, a lazy that already has a graph for all rows counts as an ordinary tensor.
        watched = {
            i: value
            for i, value in values.items()
            if value.requires_grad and not (self._partial and self.nodes[i].graph is not None)
        }
        if watched and (self._partial or (partial and grad and self._look_is_due(next(iter(watched))))):
            self._watched = watched
        return [values[self._index[goal]] if isinstance(goal, Node) else goal for goal in self.goals]

    def look(self) -> None:
        """Evaluate all rows without a graph; values that exist stay as they are."""
        for call, members in self._by_call(i for i, node in enumerate(self.nodes) if node.whole is None).items():
            first = self.nodes[members[0]]
            args = join_rows([[a.whole if isinstance(a, Node) else a for a in self.nodes[i].args] for i in members])
            with autocast_of(first):
                out = call.without_graph(args)
            for i, part in zip(members, out.split(call.sizes), strict=True):
                self._keep(i, part.detach(), None)

    def build(self) -> None:
        """Evaluate all rows with a graph, and keep the graphs."""
        if any(node.whole is not None and node.graph is None for node in self.nodes):
            self.look()  # values that exist must stay as they are, so the others are evaluated in the same two passes
        everything = {i: torch.arange(node.rows, device="cpu") for i, node in enumerate(self.nodes)}
        for i, graph in self.rebuild(everything).items():
            value = self.nodes[i].whole
            self._keep(i, graph.detach() if value is None else value, graph)

    def attach(self, loss: Tensor) -> Tensor:
        """Return the loss, with the graphs of the rows to which it gives gradient.

        The host waits for the device to learn which rows these are.
        """
        if not self._watched or not loss.requires_grad:
            return loss
        grads = torch.autograd.grad(
            loss, list(self._watched.values()), torch.ones_like(loss), retain_graph=True, allow_unused=True
        )
        weights = {i: grad for i, grad in zip(self._watched, grads, strict=True) if grad is not None}
        if not weights:
            self._record({})
            return loss
        masks = torch.stack([weight != 0 for weight in weights.values()]).cpu()
        rows = self.choose(dict(zip(weights, masks.unbind(), strict=True)))
        self._record(rows)
        if not self._partial:
            return loss
        parts = self.rebuild(rows)
        owned = [i for i in weights if i in parts]
        places = {i: rows[i].to(self.nodes[i].device, non_blocking=True) for i in owned}
        for i in owned:
            self._check(i, parts[i], self._watched[i][places[i]])
        self._parts = parts
        return attach_rows(
            loss,
            [places[i] for i in owned],
            [weights[i][places[i]] for i in owned],
            [parts[i].to(weights[i].dtype) for i in owned],
        )

    def graphs(self) -> list[Any]:
        """Return, for each goal, the tensor through whose graph its gradient flows; None if none does."""
        return [
            self._parts.get(self._index[goal], goal.graph) if isinstance(goal, Node) else goal for goal in self.goals
        ]

    def choose(self, owned: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return the rows for which each node is needed.

        Args:
            owned: the rows of goals that receive gradient, bool [B] on the host, by the index of the goal.

        Returns:
            By index, [n] int64 on the host, ascending; a node that is not needed is left out.
        """
        masks = [torch.zeros(node.rows, dtype=torch.bool, device="cpu") for node in self.nodes]
        for i, mask in owned.items():
            masks[i] |= mask
        for i in reversed(range(len(self.nodes))):
            for source in self._sources[i]:
                if source is not None:
                    masks[source] |= masks[i]
        return {i: mask.nonzero()[:, 0] for i, mask in enumerate(masks) if mask.any()}

    def rebuild(self, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Evaluate some rows with a graph. Rows that `look` has evaluated get the same random numbers again.

        Args:
            rows: as `choose` returns them.

        Returns:
            By index, [n, ...] for the n rows of that node.
        """
        parts = {}
        for i, node in enumerate(self.nodes):
            if i in rows and node.graph is not None:
                parts[i] = node.graph if len(rows[i]) == node.rows else node.graph[rows[i].to(node.device)]
        for call, members in self._by_call(i for i in range(len(self.nodes)) if i in rows and i not in parts).items():
            args = join_rows([self._arguments(i, rows, parts) for i in members])
            picks = torch.cat([rows[i] + self._starts[i] for i in members])
            with torch.enable_grad(), autocast_of(self.nodes[members[0]]):
                out = call.with_graph(args, picks)
            parts.update(zip(members, out.split([len(rows[i]) for i in members]), strict=True))
        return parts

    # Rows that are known before the loss.

    def nested(self, counts: Mapping[int, int], order: Tensor) -> dict[int, Tensor]:
        """Return the rows for which each node is needed, if each goal takes the first of one order.

        Args:
            counts: the number of rows of each lazy goal, at least 1, by its place among the goals.
            order: a permutation of the rows, [B] int64; all lazies have B rows.

        Returns:
            As `choose`, on the device of ``order``. What several goals read is needed for the largest of them.
        """
        needed = [0] * len(self.nodes)
        for k, count in counts.items():
            i = self._index[self.goals[k]]
            needed[i] = max(needed[i], count)
        for i in reversed(range(len(self.nodes))):
            for source in self._sources[i]:
                if source is not None:
                    needed[source] = max(needed[source], needed[i])
        first = {count: order[:count].sort().values for count in set(needed) if count}
        return {i: first[count] for i, count in enumerate(needed) if count}

    def masked(self, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return the rows for which each node is needed, by the rows of each lazy goal, bool [B] on the host."""
        wanted: dict[int, Tensor] = {}
        for k, mask in rows.items():
            i = self._index[self.goals[k]]
            wanted[i] = wanted[i] | mask if i in wanted else mask
        return self.choose(wanted)

    def rows_of_goals(self, rows: Mapping[int, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """Evaluate these rows once, with a graph.

        Returns:
            By the place of each lazy goal that is needed, its rows on its device, [n] int64, and their values, [n].

        Raises:
            ValueError: a lazy goal does not return [n] for n rows, or rows depend on one another.
        """
        self._check_functions()
        self._parts = self.rebuild(rows)
        for i, part in self._parts.items():
            self.nodes[i].part = rows[i].to(self.nodes[i].device, non_blocking=True), part.detach()
        done: dict[Call, int] = {}
        for i, node in enumerate(self.nodes):
            if node.graph is None:
                done[self._calls[i]] = done.get(self._calls[i], 0) + (len(rows[i]) if i in rows else 0)
        self.walked = fraction_of((call.statistics, call.rows, count) for call, count in done.items())
        found = {}
        for k, goal in enumerate(self.goals):
            i = self._index[goal] if isinstance(goal, Node) else -1
            if i in self._parts:
                self._check_goal(goal, self._parts[i], len(rows[i]))
                found[k] = rows[i].to(goal.device, non_blocking=True), self._parts[i]
        return found

    def _check_functions(self) -> None:
        """Check on first use that rows are independent, from values of all rows that are then forgotten.

        Of several processes none does: DistributedDataParallel and FSDP expect one forward for each backward.
        """
        if several_ranks():
            return
        unknown = [node for node in self.nodes if node.rows > 1 and not statistics_of(node.fn).checked]
        fresh = [node for node in self.nodes if node.whole is None]
        if not unknown or not fresh:
            return
        with self.looked():  # a run that is resumed here draws as one that is not
            pass
        self._calls, self._starts = plan_calls(self.nodes)

    @contextmanager
    def looked(self) -> Iterator[None]:
        """Have the values of all rows inside, by `look`; generators and lazies are afterwards as they were before."""
        fresh = [node for node in self.nodes if node.whole is None]
        state = rng_state(fresh[0].device) if fresh else None
        try:
            self.look()
            yield
        finally:
            if state is not None:
                set_rng_state(fresh[0].device, state)
            for node in fresh:
                node.call, node.start, node.whole = None, 0, None

    # Helpers of the steps.

    def _by_call(self, indices: Iterable[int]) -> dict[Call, list[int]]:
        """Return nodes by the call that evaluates them; calls stand in the order of their depths."""
        members: dict[Call, list[int]] = {}
        for i in indices:
            members.setdefault(self._calls[i], []).append(i)
        return members

    def _keep(self, i: int, value: Tensor, graph: Tensor | None) -> None:
        """Store the results in a node, which outlives this evaluation."""
        node = self.nodes[i]
        node.call, node.start, node.whole, node.graph = self._calls[i], self._starts[i], value, graph

    def _goal(self, node: Node) -> Tensor:
        """Return the tensor of a goal for the loss: with its graph, or as a leaf whose gradient `attach` reads."""
        value = node.graph if node.graph is not None and torch.is_grad_enabled() else node.whole
        assert value is not None
        self._check_goal(node, value, node.rows)
        if not self._partial or value is node.graph or not value.is_floating_point():
            return value
        # In float32, since half precision would round the gradient to a few digits.
        return value.detach().to(torch.promote_types(value.dtype, torch.float32)).requires_grad_()

    @staticmethod
    def _check_goal(node: Node, value: Tensor, rows: int) -> None:
        if value.dim() != 1:
            raise ValueError(f"{node!r} is a goal: it must return [n] for n rows, got {list(value.shape)} for {rows}")

    def _arguments(self, i: int, rows: Mapping[int, Tensor], parts: Mapping[int, Tensor]) -> list[Any]:
        """Return the arguments of a node for its rows."""
        node, wanted, args = self.nodes[i], rows[i], []
        for a, source in zip(node.args, self._sources[i], strict=True):
            if source is not None:
                part, present = parts[source], rows[source]
                if len(present) != len(wanted):
                    place = wanted if len(present) == a.rows else torch.searchsorted(present, wanted)
                    part = part[place.to(a.device)]
                args.append(part)
            elif is_rows(a) and len(wanted) < node.rows:
                args.append(a[wanted.to(a.device, non_blocking=True)])
            else:
                args.append(a)
        return args

    def _check(self, i: int, part: Tensor, value: Tensor) -> None:
        """Raise ValueError if rows with a graph differ from those of `look`, as when the function has changed."""
        node = self.nodes[i]
        if node.device.type == "cpu":  # on a GPU the host would wait for the values
            half = any(n.autocast[2] or (n.whole is not None and n.whole.dtype in HALF) for n in self.nodes)
            args = [a.whole if isinstance(a, Node) else a for a in node.args]
            check_rows(node.fn, part, value, args, half)

    def _pays(self) -> bool:
        return partial_pays((statistics_of(node.fn), node.rows) for node in self.nodes)

    def _look_is_due(self, i: int) -> bool:
        return statistics_of(self.nodes[i].fn).look_is_due()

    def _record(self, rows: Mapping[int, Tensor]) -> None:
        """Record which fraction of the rows of each call received gradient."""
        owned: dict[Call, int] = {}
        for i, node in enumerate(self.nodes):
            if not (self._partial and node.graph is not None):  # otherwise this evaluation did not include it
                owned[self._calls[i]] = owned.get(self._calls[i], 0) + (len(rows[i]) if i in rows else 0)
        fraction = record_owned((call.statistics, call.rows, count) for call, count in owned.items())
        if self._partial:
            self.walked = fraction
