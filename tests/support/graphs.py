"""A torch.compile backend that keeps its graphs, and lists their copies from the host."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

MADE = ("tensor", "as_tensor", "new_tensor", "from_numpy", "asarray")
FROM_THE_HOST = (*MADE, "lift_fresh_copy", "lift_fresh", "device_put")


def values_of(node: Any) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


class Graphs:
    """A backend that keeps the graphs of Dynamo or AOTAutograd, and runs them unchanged."""

    def __init__(self, aot: bool) -> None:
        self.seen: list[Any] = []
        self.aot = aot

    def __call__(self, graph: Any, inputs: Any) -> Any:
        if not self.aot:
            return self._keep(graph, inputs)
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=self._keep)(graph, inputs)

    def _keep(self, graph: Any, inputs: Any) -> Any:
        self.seen.append(graph)
        return graph.forward

    def from_the_host(self, device: str) -> set[str]:
        """Return the nodes that make tensors of numbers, or have a tensor on another device."""
        assert self.seen
        return {
            str(node)
            for graph in self.seen
            for node in graph.graph.nodes
            if getattr(getattr(node.target, "overloadpacket", node.target), "__name__", node.target) in FROM_THE_HOST
            or any(x.device.type != device for x in tree_leaves(values_of(node)) if isinstance(x, Tensor))
        }
