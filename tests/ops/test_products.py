"""Test that float32 matrix products keep their precision under every torch setting that trades it for speed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import bomkern
from bomkern import GoalSet, Group, Minimize, covariance_penalty, gaussian_total_correlation
from bomkern.common.products import loses_digits, matmul
from bomkern.common.torch_internals import TorchDispatchMode
from tests.support.servers import servers

IMPLS = pytest.mark.parametrize("server", servers("covariance_penalty"))
COMPILED = pytest.mark.skipif(bomkern.dispatch.select.extension is None, reason="not compiled")
LOWER = pytest.mark.parametrize("precision", ["high", "medium"])
SETTINGS = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
CALLS: dict[str, Callable[..., Tensor]] = {
    "parts": covariance_penalty,
    "normalized parts": functools.partial(covariance_penalty, normalize=True),
    "batch": functools.partial(covariance_penalty, reduction="batch"),
    "normalized batch": functools.partial(covariance_penalty, normalize=True, reduction="batch"),
}


@pytest.fixture(autouse=True)
def highest() -> Iterator[None]:
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


def settings() -> list[str]:
    return [backend.fp32_precision for backend in SETTINGS]


def sample(batch: int, dims: int, device: str) -> Tensor:
    z = torch.randn(batch, dims, generator=torch.Generator().manual_seed(0))
    return (z + 0.5 * z.roll(1, 1) + torch.linspace(-3, 3, dims)).to(device).requires_grad_()


def derivatives(call: Callable[[Tensor], Tensor], z: Tensor) -> list[Tensor]:
    """Return the value, the gradient of its weighted sum, and a derivative of that gradient."""
    value = call(z)
    weight = torch.arange(1.0, value.numel() + 1, device=z.device).reshape(value.shape)
    (grad,) = torch.autograd.grad((value * weight).sum(), z, retain_graph=True)
    (once,) = torch.autograd.grad((value * weight).sum(), z, create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), z)
    return [value, grad, once, twice]


def close(got: list[Tensor], want: list[Tensor]) -> bool:
    return all((a - b).abs().max() <= 2e-5 * b.abs().max() for a, b in zip(got, want, strict=True))


class Products(TorchDispatchMode):
    """Record the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "mm":
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@IMPLS
@LOWER
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("batch", "dims"), [(200, 40), (40, 200)])
def test_covariance_penalty(server: tuple[str, str], precision: str, name: str, batch: int, dims: int) -> None:
    impl, device = server
    z, call = sample(batch, dims, device), functools.partial(CALLS[name], impl=impl)
    want = derivatives(call, z)
    torch.set_float32_matmul_precision(precision)
    before = settings()
    assert close(derivatives(call, z), want) and settings() == before
    with pytest.raises(ValueError, match="z must have shape"):
        call(z[0])
    assert settings() == before


@LOWER
def test_gaussian_total_correlation(precision: str) -> None:
    z = sample(200, 40, "cpu")
    want = derivatives(gaussian_total_correlation, z)
    torch.set_float32_matmul_precision(precision)
    got = derivatives(gaussian_total_correlation, z)
    assert got[0].dtype == torch.float32 and close(got, want)
    copied = torch.cat([z, z[:, :1] + z[:, 1:2]], 1).detach()
    assert gaussian_total_correlation(copied) == torch.inf


@LOWER
def test_goal_set_by_the_reference(precision: str) -> None:
    goals = GoalSet(
        a=Group(**{f"m{k}": Minimize(1.0 + k) for k in range(20)}),
        **{f"g{k}": Minimize(1.0 + k / 7) for k in range(20)},
        temperature=0.7,
        impl="reference",
    ).eval()

    def loss(z: Tensor) -> Tensor:
        columns = z.unbind(1)
        named = {f"g{k}": columns[20 + k] for k in range(20)}
        return goals({"a": {f"m{k}": columns[k] for k in range(20)}, **named}).loss

    z = torch.rand(300, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (want,) = torch.autograd.grad(loss(z), z)
    torch.set_float32_matmul_precision(precision)
    with Products() as products:
        (got,) = torch.autograd.grad(loss(z), z)
    assert torch.equal(got, want) and not products.seen


@pytest.mark.parametrize("how", ["all", "gpu", "old", "generic"])
def test_a_gpu_told_to_use_tf32_multiplies_in_float64(how: str) -> None:
    """The dtype shows the choice, so no GPU is needed.

    The settings are the old switch, the new switch, and a mix of both.
    """
    with FakeTensorMode():
        a = torch.empty(20, 30, device="cuda")
        with Products() as products:
            matmul(a, a.T), matmul(a.double(), a.T.double())
        assert products.seen == [torch.float32, torch.float64] and not loses_digits("cuda")
        try:
            if how == "all":
                torch.set_float32_matmul_precision("high")
            elif how == "gpu":
                torch.backends.cuda.matmul.fp32_precision = "tf32"
            elif how == "old":
                torch.backends.cuda.matmul.allow_tf32 = True
            else:
                torch.backends.cuda.matmul.fp32_precision = "none"
                torch.backends.fp32_precision = "tf32"
            with Products() as products:
                out = matmul(a, a.T)
                matmul(a.double(), a.T.double())
        finally:
            torch.backends.fp32_precision = "none"
            torch.set_float32_matmul_precision("highest")
        assert products.seen == [torch.float64] * 2 and out.dtype == torch.float32
    assert not loses_digits("meta")


@LOWER
def test_a_compiled_call(precision: str) -> None:
    z = sample(200, 40, "cpu")
    call = functools.partial(covariance_penalty, normalize=True, impl="reference")
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    want = [compiled(z).detach(), call(z).detach()]
    torch.set_float32_matmul_precision(precision)
    assert close([compiled(z), call(z)], want)


@IMPLS
def test_threads_keep_their_settings(server: tuple[str, str]) -> None:
    """No global setting changes, even for a while, because other threads multiply under their own settings."""
    impl, device = server
    z, seen, done = sample(200, 40, device).detach(), set(), threading.Event()
    torch.set_float32_matmul_precision("high")
    want = tuple(settings())

    def watch() -> None:
        while not done.is_set():
            seen.add(tuple(settings()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(50):
        bomkern.covariance_penalty(z, impl=impl)
    done.set()
    watcher.join()
    assert seen == {want}


@COMPILED
@pytest.mark.parametrize(("batch", "dims"), [(400, 40), (40, 400)])
def test_the_cpu_multiplies_in_float64_where_torch_takes_bfloat16(batch: int, dims: int) -> None:
    """The digits show the choice. On a CPU without bfloat16 products, torch's results are float32's."""
    z = sample(batch, dims, "cpu").detach()
    x = z.double() - z.double().mean(0)
    want = x @ x.T if dims > batch else (x.T @ x / (batch - 1)).fill_diagonal_(0)
    torch.set_float32_matmul_precision("medium")
    got = torch.ops.bomkern.covariance_penalty(z, False, False, True)[2]
    assert (got - want).abs().max() <= 1.2e-7 * want.abs().max()


@pytest.mark.parametrize("name", [*CALLS, "gaussian_total_correlation"])
def test_no_product_of_plain_pytorch_is_of_float32(name: str) -> None:
    z = sample(200, 40, "cpu")
    call = functools.partial(CALLS[name], impl="reference") if name in CALLS else gaussian_total_correlation
    torch.set_float32_matmul_precision("medium")
    with Products() as products:
        derivatives(call, z)
    assert set(products.seen) == {torch.float64}
