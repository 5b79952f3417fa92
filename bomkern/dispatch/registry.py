"""The record of an op, from which the rest of bomkern, its tests, benches and docs read.

`schemas.OPS` holds one record per op. Its readers are dispatch, `bomkern.info`, transforms, second derivatives, the
parameters of the tests, the fuzzer's check, the benches and the navigation of the docs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]


@dataclass(frozen=True)
class Schema:
    """One entry of PyTorch's dispatcher.

    Attributes:
        text: name, arguments and results, as `torch.library.Library.define` takes them.
        fake: returns results with shapes and dtypes, without data.
        in_place: the definition of an op that writes into its arguments. It serves if nothing is compiled, and vmap
            raises an error for the op.
    """

    text: str
    fake: Function
    in_place: Function | None = None

    @property
    def name(self) -> str:
        return self.text.partition("(")[0]


@dataclass(frozen=True)
class Op:
    """An op: its schemas, its definition, and the functions that connect both to a call.

    Attributes:
        forward, backward: the schemas that csrc/NAME.cpp registers.
        more: further schemas.
        reference: the definition, which ``impl="reference"`` serves and the tests compare with.
        check: takes the arguments of a call that PyTorch's dispatcher or the op refused, and raises an error that
            names the bad one and says what to write instead.
        definition: the schema and the function that a compiled backward calls for second derivatives, see
            `double_backward`.
        results: the results of the compiled op that the reference returns too; None for all.
        compiled: returns the function that calls the compiled op; None for a plain call.
        routed: wraps an implementation in Python so that branches can be skipped, see `routing`. Compiled
            implementations route by themselves.
        loss_alone: whether only the first result has a gradient.
        public: the name of the public function, if it is not that of the op.
    """

    forward: Schema
    backward: Schema
    reference: Function
    check: Function
    definition: tuple[str, Function]
    results: int | slice | None = None
    more: tuple[Schema, ...] = ()
    compiled: Callable[[], Function] | None = None
    routed: Callable[[Function], Function] | None = None
    loss_alone: bool = False
    public: str = ""

    @property
    def name(self) -> str:
        """The name of the op in torch.ops.bomkern, kernels/NAME, csrc/NAME.cpp and dispatch/triton/NAME.py."""
        return self.forward.name

    @property
    def public_name(self) -> str:
        return self.public or self.name

    @property
    def page(self) -> str:
        """The path of the op's page in docs/."""
        return f"ops/{self.public_name}.md"

    @property
    def schemas(self) -> tuple[Schema, ...]:
        return self.forward, *self.more, self.backward
