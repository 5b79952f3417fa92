"""Inputs of the five statistics, and the comparison of their calls with the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import bomkern
from bomkern import consistency_variance, covariance_penalty, gaussian_kl
from tests.support.servers import servers
from tests.support.tolerances import assert_as_good_as_eager

Inputs = tuple[Tensor, ...]
Lay = Callable[[Tensor], Tensor]
Call = Callable[..., "Tensor | tuple[Tensor, ...]"]  # (*inputs, impl=)

SHAPES = [(2, 1), (2, 3), (3, 70), (7, 1), (17, 33), (64, 16), (65, 17), (130, 300), (1030, 9)]  # B >= 2
LARGE = [(3001, 70), (600, 300), (5, 2050)]  # larger than every tile
MATRIX_LAYOUTS: dict[str, Lay] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "columns of a wider tensor": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every third column": lambda x: x.repeat_interleave(3, 1)[:, ::3],
    "offset": lambda x: torch.cat([x[:3], x])[3:],
    "one row for all": lambda x: x[:1].expand(x.shape),
    "one column for all": lambda x: x[:, :1].expand(x.shape),
}
LAYOUTS: dict[str, Lay] = {
    **MATRIX_LAYOUTS,
    "flipped": lambda x: x.flip(0, 1),
    "flipped, transposed": lambda x: x.T.flip(0).T,
}


def codes(batch: int, dims: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Return z, mu and logvar of a partly collapsed code: the variances of mu go from 0.001 to 4."""
    generator = torch.Generator().manual_seed(batch * 1000 + dims)
    mu, wide, noise = torch.randn(3, batch, dims, generator=generator, dtype=torch.float64)
    mu = mu * torch.logspace(-1.5, 0.3, dims, dtype=torch.float64)
    logvar = wide * 0.5 - 1
    return (mu + torch.exp(logvar / 2) * noise).to(dtype), mu.to(dtype), logvar.to(dtype)


def views(batch: int, dims: int, count: int = 3, dtype: torch.dtype = torch.float32) -> Inputs:
    """Return ``count`` noisy views of one code per sample."""
    generator = torch.Generator().manual_seed(batch * 1000 + dims + count)
    code, *noise = torch.randn(count + 1, batch, dims, generator=generator, dtype=torch.float64)
    return tuple((code + 0.3 * x).to(dtype) for x in noise)


@dataclass(frozen=True)
class Op:
    """One op as the shared tests call it: ``call(*inputs, impl=)`` on the inputs that ``make(B, D)`` returns.

    Attributes:
        arguments: names of the inputs. numbers: the arguments of torch.ops.bomkern.NAME after them.
    """

    name: str
    make: Callable[[int, int], Inputs]
    call: Call
    arguments: tuple[str, ...]
    numbers: tuple[float, ...] = ()

    def on_a_code(self, z: Tensor, mu: Tensor, logvar: Tensor, impl: str) -> Inputs:
        """Return the results on those of z, mu and logvar that the op takes, or on z for other inputs."""
        given = {"z": z, "mu": mu, "logvar": logvar}
        return values_of(self.call(*(given.get(name, z) for name in self.arguments), impl=impl))

    def backward(self, op: Any, inputs: Inputs, out: Inputs) -> list[tuple[Any, ...]]:
        """Return the arguments of the op's backward, if they are the forward's arguments and saved tensors."""
        wants = any(argument.name == "want" for argument in op.default._schema.arguments)
        return [(ramp(out[0]), *inputs, *out[1:], *self.numbers, *([[True] * len(inputs)] if wants else []))]


OPS = {
    op.name: op
    for op in (
        Op("gaussian_kl", lambda b, d: codes(b, d)[1:], bomkern.gaussian_kl, ("mu", "logvar")),
        Op(
            "consistency_variance",
            views,
            lambda *given, impl=None: bomkern.consistency_variance(given, impl=impl),
            ("views[0]", "views[1]", "views[2]"),
        ),
        Op("active_units", lambda b, d: codes(b, d)[1:2], bomkern.active_units, ("mu",)),
        Op("latent_statistics", codes, bomkern.latent_statistics, ("z", "mu", "logvar")),
        Op("covariance_penalty", lambda b, d: codes(b, d)[:1], bomkern.covariance_penalty, ("z",)),
    )
}


def leaves(inputs: Sequence[Tensor], dtype: torch.dtype | None = None, device: str = "cpu") -> Inputs:
    return tuple(x.detach().to(device=device, dtype=dtype or x.dtype).clone().requires_grad_() for x in inputs)


def values_of(result: Tensor | tuple[Tensor, ...]) -> Inputs:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def ramp(value: Tensor) -> Tensor:
    """Return a weight of either sign for each element."""
    return torch.linspace(-1, 2, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)


def _strided(value: Tensor) -> Tensor:
    return torch.stack([ramp(value), ramp(value) * 9, ramp(value) * 7], -1)[..., 0]


PULLS: dict[str, Callable[[Tensor], Tensor]] = {
    "weights": ramp,
    "sum": lambda value: value.new_ones(()).expand(value.shape),
    "mean": lambda value: (value.new_ones(()) / value.numel()).expand(value.shape),
    "strided": _strided,
    "a lazy minus": lambda value: torch._neg_view(-ramp(value)),  # as for a conjugate: memory holds the negated values
    "offset": lambda value: torch.cat([value.new_full((5,), 1e3), ramp(value).reshape(-1)])[5:].reshape(value.shape),
}


def run(
    call: Call,
    inputs: Inputs,
    impl: str | None,
    *,
    pull: Callable[[Tensor], Tensor] = ramp,
    fields: Sequence[int] | None = None,
    lay: Lay = lambda x: x,
) -> tuple[Inputs, Inputs]:
    """Return values and gradients for ``pull`` of each value, or of the values that ``fields`` names."""
    values = values_of(call(*(lay(x) for x in inputs), impl=impl))
    used = [v for k, v in enumerate(values) if v.requires_grad and (fields is None or k in fields)]
    wanted = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(used, wanted, [pull(value) for value in used], materialize_grads=True)
    return tuple(value.detach() for value in values), grads


def check(
    call: Call,
    inputs: Inputs,
    server: tuple[str, str],
    *,
    slack: float = 1e-6,
    unit: float = 0.0,
    pull: Callable[[Tensor], Tensor] = ramp,
    fields: Sequence[int] | None = None,
    lay: Lay = lambda x: x,
) -> None:
    """Check values and gradients of ``server``.

    Errors against float64 may be twice those of eager float32; float64 itself must be within slack.
    """
    impl, device = server
    wide = any(x.dtype == torch.float64 for x in inputs)
    how = {"pull": pull, "fields": fields, "lay": lay}
    exact = run(call, leaves(inputs, torch.float64), "reference", **how)  # type: ignore[arg-type]
    eager = exact if wide else run(call, leaves(inputs, torch.float32), "reference", **how)  # type: ignore[arg-type]
    values, grads = run(call, leaves(inputs, device=device), impl, **how)  # type: ignore[arg-type]
    assert all(value.dtype == (torch.float64 if wide else torch.float32) for value in values)
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    for kind, ours, theirs, truth in zip(("value", "gradient"), (values, grads), eager, exact, strict=True):
        for k, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
            # A half gradient is the float32 gradient, rounded once.
            rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: max(slack, 1e-6)}.get(a.dtype, slack)
            try:
                assert_as_good_as_eager(a, b, c, rounding, unit)
            except AssertionError as error:
                raise AssertionError(f"{kind} {k}: {error}") from error


def check_far(call: Call, inputs: Inputs, server: tuple[str, str]) -> None:
    """Check means of 1e4 with deviations of 1: the largest error is below 1e-4 of the largest value."""
    impl, device = server
    ours = run(call, leaves(inputs, device=device), impl)
    exact = run(call, leaves(inputs, torch.float64), "reference")
    for kind, some, truths in zip(("value", "gradient"), ours, exact, strict=True):
        for k, (a, b) in enumerate(zip(some, truths, strict=True)):
            error, size = (a.double().cpu() - b).abs().max(), b.abs().max()
            assert error < 1e-4 * size, f"{kind} {k}: error {error:.3g} of {size:.3g}"


def check_places(
    call: Call, inputs: Inputs, server: tuple[str, str], where: dict[tuple[int, ...], float], **how: Sequence[int]
) -> list[Tensor]:
    """Put numbers at [input, row, column], and check that exactly the reference's elements are not finite.

    Returns the masks of non-finite elements, of the values and then of the gradients.
    """
    impl, device = server
    inputs = tuple(x.clone() for x in inputs)
    for (k, row, column), number in where.items():
        inputs[k][row, column] = number
    ours = [x.cpu() for part in run(call, leaves(inputs, device=device), impl, **how) for x in part]  # type: ignore[arg-type]
    exact = [x for part in run(call, leaves(inputs, torch.float64), "reference", **how) for x in part]  # type: ignore[arg-type]
    for k, (a, b) in enumerate(zip(ours, exact, strict=True)):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite), f"result {k}: {a[a.isfinite() != finite]}"
        if all(number != number for number in where.values()):
            assert torch.equal(a.isnan(), b.isnan()), f"result {k}"
        size = b[finite].abs().max() if finite.any() else torch.tensor(0.0)
        assert torch.allclose(a.double()[finite], b[finite], rtol=1e-4, atol=1e-5 * size.item()), f"result {k}"
    return [~x.isfinite() for x in exact]


def check_only_the_gradients_wanted(call: Call, inputs: Inputs, server: tuple[str, str]) -> None:
    """Check each choice of inputs that require grad: the same bits as for all inputs, and None for the others."""
    impl, device = server
    every = leaves(inputs, device=device)
    values, grads = run(call, every, impl)
    for choice in range(1, 2 ** len(inputs)):
        wanted = [bool(choice >> k & 1) for k in range(len(inputs))]
        some = tuple(x if w else x.detach() for x, w in zip(every, wanted, strict=True))
        again, got = run(call, some, impl)
        assert all(torch.equal(a, b) for a, b in zip(again, values, strict=True))
        expected = [g for g, w in zip(grads, wanted, strict=True) if w]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), wanted


def check_same_bits(call: Call, inputs: Inputs) -> None:
    """Check that impl="cpu" gives the same bits for any number of threads, forward and backward."""
    inputs, before, results = leaves(inputs), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            values, grads = run(call, inputs, "cpu")
            results.append([*values, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def shuffled(size: int, seed: int, device: str) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).to(device)


def check_second_derivative(call: Call, inputs: Inputs, impl: str) -> None:
    """Check first derivatives, with and without ``create_graph``, and second ones in float64."""

    def once(which: str, again: bool) -> Inputs:
        value = sum(x.square().sum() for x in values_of(call(*inputs, impl=which)))
        return torch.autograd.grad(value, inputs, create_graph=again)  # type: ignore[arg-type]

    def twice(first: Inputs) -> Inputs:
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)  # type: ignore[arg-type]

    plain, ours, theirs = once(impl, False), once(impl, True), once("reference", True)
    for made, want in ((ours, plain), (ours, theirs), (twice(ours), twice(theirs))):
        for a, b in zip(made, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


EVERY = pytest.mark.parametrize(
    ("name", "server"), [pytest.param(op, *s.values, id=f"{op}-{s.id}") for op in OPS for s in servers(op)]
)


def ragged(mu: Tensor, logvar: Tensor, *, impl: str | None = None) -> Tensor:
    """Evaluate a block prior whose last block is shorter: 4 dimensions make blocks of 3 and 1."""
    return gaussian_kl(mu, logvar, 3 if mu.shape[1] > 3 else 2, 0.5, impl=impl)


# Variants of each op's plain call that take other paths through the kernels.
VARIANTS: dict[str, list[Call]] = {
    "gaussian_kl": [functools.partial(gaussian_kl, block_size=2, rho=0.5), ragged],
    "consistency_variance": [lambda *given, impl=None: consistency_variance(torch.stack(given), impl=impl)],
    "covariance_penalty": [
        functools.partial(covariance_penalty, normalize=normalize, reduction=reduction)
        for normalize, reduction in ((True, "sample"), (False, "batch"), (True, "batch"))
    ],
}


def calls(name: str) -> list[Call]:
    return [OPS[name].call, *VARIANTS.get(name, [])]
