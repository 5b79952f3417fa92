"""The lazies that a loss needs, in order, and which of them one call of their function evaluates together."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .call import Call, is_rows
from .node import Node


def sorted_nodes(goals: Sequence[Node]) -> list[Node]:
    """Return the goals and all lazies that they read, by depth and then in the order of their creation.

    The arguments of a lazy that has a graph for all rows are left out, since they are not needed again.
    """
    nodes: set[Node] = set()
    todo = list(goals)
    while todo:
        node = todo.pop()
        if node not in nodes:
            nodes.add(node)
            if node.graph is None:
                todo += [a for a in node.args if isinstance(a, Node)]
    return sorted(nodes, key=lambda node: (node.depth, node.made))


def plan_calls(nodes: Sequence[Node]) -> tuple[dict[int, Call], dict[int, int]]:
    """Return the call of each node, and the position of its first row in that call. No function is called yet."""
    calls = {i: node.call for i, node in enumerate(nodes) if node.call is not None}
    starts = {i: nodes[i].start for i in calls}
    joint: dict[Any, list[int]] = {}
    for i, node in enumerate(nodes):
        if i not in calls:
            joint.setdefault(_joint_key(node), []).append(i)
    for members in joint.values():
        sizes = [nodes[i].rows for i in members]
        call = Call(nodes[members[0]].fn, sizes)
        for k, i in enumerate(members):
            calls[i], starts[i] = call, sum(sizes[:k])
    return calls, starts


def _joint_key(node: Node) -> tuple[Any, ...]:
    """Return a key that is equal for nodes that one call can evaluate.

    Such nodes have the same depth, function, autocast and arguments, except for the rows. Objects are compared by
    identity, since they need not be hashable.
    """
    return node.depth, _identity(node.fn), node.autocast, tuple(_kind(a) for a in node.args)


def _kind(argument: Any) -> Any:
    """Return a key that is equal for arguments that one call can take."""
    if isinstance(argument, Node):
        return "rows", _identity(argument.fn)
    if is_rows(argument):
        return "rows", (argument.shape[1:], argument.dtype)
    return id(argument)


def _identity(fn: Callable[..., Any]) -> Any:
    """Return the same key for the same function; a bound method is another object each time it is looked up."""
    return (id(fn.__self__), id(fn.__func__)) if isinstance(fn, types.MethodType) else id(fn)


def autocast_of(node: Node) -> AbstractContextManager[Any]:
    """Return a context with the autocast under which the node was made."""
    device, dtype, enabled = node.autocast
    if not enabled and not torch.is_autocast_enabled(device):
        return nullcontext()
    # The cache stays off: it would return a weight that was cast without a graph.
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


def join_rows(args: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the arguments of one call for several nodes: rows are concatenated, anything else is taken once."""
    return [
        torch.cat(column) if len(column) > 1 and is_rows(column[0]) else column[0] for column in zip(*args, strict=True)
    ]
