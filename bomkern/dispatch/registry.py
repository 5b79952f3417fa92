"""The record of an op: what the rest of bomkern, its tests, benches and docs need to know of it.

`schemas.OPS` holds one record per op. Dispatch, `bomkern.info`, transforms, second derivatives, the tests' parameters,
the fuzzer's check, the benches and the docs' navigation read it.
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
        fake: gives shapes and dtypes without data.
        in_place: the definition of an op that writes into its arguments. It serves where nothing is compiled, and
            vmap refuses the op.
    """

    text: str
    fake: Function
    in_place: Function | None = None

    @property
    def name(self) -> str:
        return self.text.partition("(")[0]


@dataclass(frozen=True)
class Op:
    """An op: its schemas, its definition, and how a call reaches what was compiled.

    Attributes:
        forward, backward: what csrc/NAME.cpp registers. more: further entries.
        reference: the definition, which ``impl="reference"`` serves and the tests compare with.
        check: takes the arguments of a call that PyTorch's dispatcher refused, and raises an error that names the bad
            one.
        definition: the schema and the function that a compiled backward calls for second derivatives, see
            `double_backward`.
        results: those results of the compiled op that the reference returns too; None for all.
        compiled: makes the function that calls the compiled op; None for a plain call.
        routed: wraps an implementation in Python so that branches can be left out, see `routing`. Compiled ones do
            it themselves.
        loss_alone: only the first result has a gradient.
        public: the name of the public function, where it is not the op's.
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
        """The op's name in every place: torch.ops.bomkern, kernels/NAME, csrc/NAME.cpp, dispatch/triton/NAME.py."""
        return self.forward.name

    @property
    def public_name(self) -> str:
        return self.public or self.name

    @property
    def page(self) -> str:
        """Its page in docs/."""
        return f"ops/{self.public_name}.md"

    @property
    def schemas(self) -> tuple[Schema, ...]:
        return self.forward, *self.more, self.backward
