"""Test every op under torch.func: the result is right, or the error says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import bomkern
from bomkern import Anchored, GoalSet, Group, Minimize, MinimizeHard, Upper, min_goal_loss, reference
from bomkern.dispatch import select
from tests.support.processes import run_tests
from tests.support.servers import servers
from tests.support.statistics import OPS

IMPLS = pytest.mark.parametrize("server", servers("gaussian_kl"))
Call = Callable[..., tuple[Tensor, ...]]
CONSTRAINTS = (Minimize(0.5), MinimizeHard(1.0), Upper(0.2, 0.3))


def goals_of(z: Tensor, mu: Tensor, logvar: Tensor) -> list[Tensor]:
    return [z[:, 0].abs(), mu[:, 1].abs(), logvar[:, 0].mean()]


def goal_set(impl: str | None, **options: Any) -> GoalSet:
    group = Group(x=Minimize(0.5), y=MinimizeHard(1.0))
    return GoalSet(a=Anchored(0.0, 1.0), b=group, c=Upper(0.2, 0.3), impl=impl, **options)


def raw_of(z: Tensor, mu: Tensor, logvar: Tensor) -> dict[str, Any]:
    a, x, c = goals_of(z, mu, logvar)
    return {"a": a, "b": {"x": x, "y": z[:, 1].abs()}, "c": c}


def by_goal_set(**options: Any) -> Call:
    pairs = [server.values[0] for server in servers("goal_set")]  # a set made inside a transform would keep its tensors
    made = {(impl, device): goal_set(impl, **options).to(device).eval() for impl, device in pairs}

    def call(z: Tensor, mu: Tensor, logvar: Tensor, impl: str) -> tuple[Tensor, ...]:
        return (made[impl, z.device.type](raw_of(z, mu, logvar)).loss,)

    return call


def with_stats(z: Tensor, mu: Tensor, logvar: Tensor, impl: str) -> tuple[Tensor, ...]:
    loss, stats = min_goal_loss(goals_of(z, mu, logvar), CONSTRAINTS, return_stats=True, impl=impl)
    return loss, *stats


# (z, mu, logvar, impl) -> the results, differentiable tensors first.
CALLS: dict[str, Call] = {
    "min_goal_loss": lambda *x: (min_goal_loss(goals_of(*x[:3]), CONSTRAINTS, reduction="none", impl=x[3]),),
    "min_goal_loss, stats": with_stats,
    "min_goal_loss, a matrix": lambda z, mu, logvar, impl: (min_goal_loss(z.abs(), reduction="min", impl=impl),),
    "GoalSet": by_goal_set(reduction="none"),
    "GoalSet, soft": by_goal_set(temperature=0.1),
    "GoalSet, spill": by_goal_set(spill=0.5),
    "total_correlation": lambda z, mu, logvar, impl: (bomkern.total_correlation(z, mu, logvar, 100, "mss", impl=impl),),
    "total_correlation, parts": lambda *x: bomkern.total_correlation(*x[:3], 100, parts=True, impl=x[3]),
    "gaussian_total_correlation": lambda z, mu, logvar, impl: (bomkern.gaussian_total_correlation(z),),
    "gaussian_kl": lambda z, mu, logvar, impl: (bomkern.gaussian_kl(mu, logvar, 3, 0.3, impl=impl),),
    "consistency_variance": lambda z, mu, logvar, impl: (bomkern.consistency_variance([z, mu, logvar], impl=impl),),
    "consistency_variance, one tensor": lambda z, mu, logvar, impl: (
        bomkern.consistency_variance(torch.stack([z, mu]), impl=impl),
    ),
    "covariance_penalty": lambda z, mu, logvar, impl: (bomkern.covariance_penalty(z, True, impl=impl),),
    "covariance_penalty, batch": lambda z, mu, logvar, impl: (
        bomkern.covariance_penalty(z, reduction="batch", impl=impl),
    ),
    "active_units": lambda z, mu, logvar, impl: bomkern.active_units(mu, impl=impl),
    "latent_statistics": lambda z, mu, logvar, impl: tuple(bomkern.latent_statistics(z, mu, logvar, impl=impl)),
}


for _name, _op in OPS.items():
    CALLS.setdefault(_name, _op.on_a_code)
EACH = pytest.mark.parametrize("name", CALLS)


def codes(device: str, *sizes: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    made = [torch.randn(*sizes, 8, 4, generator=source, dtype=torch.float64) for _ in range(3)]
    made[2] = 0.3 * made[2] - 0.5
    return [x.to(device=device, dtype=dtype) for x in made]


def total(values: tuple[Tensor, ...]) -> Tensor:
    """Return one number that depends on all differentiable results with different weights."""
    some = [x for x in values if x.is_floating_point()]
    return torch.stack([(k + 1) * x.square().sum() for k, x in enumerate(some)]).sum()


def by_autograd(name: str, given: list[Tensor], impl: str = "reference") -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    return torch.autograd.grad(total(CALLS[name](*leaves, impl)), leaves, materialize_grads=True)


def assert_close(got: Any, want: Any) -> None:
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-9, atol=1e-11)


def stacked(each: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(map(torch.stack, zip(*each, strict=True)))


@EACH
@IMPLS
def test_gradients(server: tuple[str, str], name: str) -> None:
    impl, device = server
    given = codes(device)

    def loss(*x: Tensor) -> Tensor:
        return total(CALLS[name](*x, impl))

    want = by_autograd(name, given)
    assert_close(grad(loss, argnums=(0, 1, 2))(*given), want)
    value, pull = vjp(loss, *given)  # the pullback runs after its level has ended
    pulled = pull(torch.ones_like(value))
    assert_close(pulled, want)
    assert not any(x.requires_grad for x in pulled)
    some = grad(lambda z: loss(z, *given[1:]))(given[0])
    assert_close([some], want[:1])


@EACH
@IMPLS
def test_jacobian(server: tuple[str, str], name: str) -> None:
    impl, device = server
    given = codes(device)
    got = jacrev(lambda *x: CALLS[name](*x, impl)[0], argnums=(0, 1, 2))(*given)
    want = torch.autograd.functional.jacobian(lambda *x: CALLS[name](*x, "reference")[0], tuple(given))
    assert_close(got, want)


@EACH
@IMPLS
def test_vmap(server: tuple[str, str], name: str) -> None:
    """vmap gives bitwise the results of a loop: over all inputs, over one, over another dim, and nested."""
    impl, device = server

    def call(*x: Tensor) -> tuple[Tensor, ...]:
        return CALLS[name](*x, impl)

    many = codes(device, 3)
    first = [x[0] for x in many]
    loop = stacked([call(*x) for x in zip(*many, strict=True)])
    exact = impl != "reference"  # vmap adds up the reference's sums in another order
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-9, "atol": 1e-11}
    if name == "gaussian_total_correlation":
        tolerance = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(vmap(call)(*many), loop, **tolerance)
    torch.testing.assert_close(vmap(call, in_dims=2)(*(x.movedim(0, 2) for x in many)), loop, **tolerance)
    one = stacked([call(z, *first[1:]) for z in many[0]])
    torch.testing.assert_close(vmap(call, in_dims=(0, None, None))(many[0], *first[1:]), one, **tolerance)
    pairs = [torch.stack([x, 2 * x]) for x in many]
    twice = stacked([stacked([call(*y) for y in zip(*x, strict=True)]) for x in zip(*pairs, strict=True)])
    torch.testing.assert_close(vmap(vmap(call))(*pairs), twice, **tolerance)


@EACH
@IMPLS
def test_vmap_and_gradients(server: tuple[str, str], name: str) -> None:
    impl, device = server
    many = codes(device, 3)

    def loss(*x: Tensor) -> Tensor:
        return total(CALLS[name](*x, impl))

    want = stacked([by_autograd(name, list(x)) for x in zip(*many, strict=True)])
    assert_close(vmap(grad(loss, argnums=(0, 1, 2)))(*many), want)
    assert_close(grad(lambda *x: vmap(loss)(*x).sum(), argnums=(0, 1, 2))(*many), want)
    leaves = [x.clone().requires_grad_() for x in many]
    assert_close(torch.autograd.grad(vmap(loss)(*leaves).sum(), leaves, materialize_grads=True), want)


@EACH
@IMPLS
def test_second_derivatives(server: tuple[str, str], name: str) -> None:
    impl, device = server
    given = codes(device)

    def second(x: list[Tensor], impl: str) -> tuple[Tensor, ...]:
        def loss(*x: Tensor) -> Tensor:
            return total(CALLS[name](*x, impl))

        def slope(*x: Tensor) -> Tensor:
            return sum((g.square().sum() for g in grad(loss, argnums=(0, 1, 2))(*x)), x[0].new_zeros(()))

        def pulled(*x: Tensor) -> Tensor:
            value, pull = vjp(loss, *x)
            return sum((g.square().sum() for g in pull(torch.ones_like(value))), x[0].new_zeros(()))

        made = grad(slope, argnums=(0, 1, 2))(*x)
        assert_close(grad(pulled, argnums=(0, 1, 2))(*x), made)
        return made

    assert_close(second(given, impl), second(given, "reference"))


@EACH
@IMPLS
def test_forward_mode(server: tuple[str, str], name: str) -> None:
    """The reference's forward mode is right. The others refuse it, in torch.func and in eager mode."""
    impl, device = server
    given = tuple(codes(device))

    def loss(*x: Tensor) -> Tensor:
        return total(CALLS[name](*x, impl))

    def eager() -> Tensor:
        with forward_ad.dual_level():
            dual = loss(*(forward_ad.make_dual(x, x) for x in given))
            return forward_ad.unpack_dual(dual).tangent

    if impl == "reference" or name == "gaussian_total_correlation":
        want = sum((g * x).sum() for g, x in zip(by_autograd(name, list(given)), given, strict=True))
        assert_close([jvp(loss, given, given)[1], eager()], [want, want])
        return
    refused = pytest.raises(NotImplementedError, match=r"has no forward-mode derivative: use .* impl='reference'$")
    with refused:
        jvp(loss, given, given)
    with refused:
        eager()
    with forward_ad.dual_level():  # without tangents there is nothing to refuse
        assert torch.equal(loss(*given), loss(*given))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@IMPLS
def test_dtypes(server: tuple[str, str], half: torch.dtype) -> None:
    impl, device = server
    z, mu, logvar = codes(device)
    given = [z.to(half), mu.float(), logvar.to(half)]
    out = vmap(lambda *x: bomkern.latent_statistics(*x, impl=impl).kl)(*(x.expand(2, -1, -1) for x in given))
    grads = grad(lambda *x: total(CALLS["latent_statistics"](*x, impl)), argnums=(0, 1, 2))(*given)
    assert out.dtype == torch.float32 and [g.dtype for g in grads] == [x.dtype for x in given]


@IMPLS
def test_bad_input_is_named(server: tuple[str, str]) -> None:
    impl, device = server
    _, mu, logvar = codes(device, 3)
    with pytest.raises(ValueError, match="logvar must have the shape of mu"):
        vmap(lambda a, b: bomkern.gaussian_kl(a, b, impl=impl))(mu, logvar[..., :2])
    if impl != "reference":
        with pytest.raises(ValueError, match=r"^torch.vmap: .* at least one slice"):
            vmap(lambda a, b: bomkern.gaussian_kl(a, b, impl=impl))(mu[:0], logvar[:0])


def test_reference_in_chunks() -> None:
    """Total correlation works in chunks of rows under torch.func, which does not accept checkpoints."""
    z, mu, logvar = codes("cpu")

    def loss(z: Tensor, limit: int) -> Tensor:
        return reference.total_correlation(z, mu, logvar, None, False, limit=limit).square().sum()

    assert_close([grad(loss)(z, 64)], [grad(loss)(z, 2**23)])
    leaf = z.clone().requires_grad_()
    assert_close(torch.autograd.grad(loss(leaf, 64), leaf), [grad(loss)(z, 64)])


class TestGoalSet:
    """Test a GoalSet in training mode, where a step changes its state."""

    @IMPLS
    @pytest.mark.parametrize("spill", [0.0, 0.5])
    def test_a_step_is_kept(self, server: tuple[str, str], spill: float) -> None:
        impl, device = server
        inside, outside = (goal_set(impl, spill=spill).to(device).double() for _ in range(2))
        for scale in (1.0, 2.0, 3.0):
            given = [scale * x for x in codes(device)]
            made = grad(lambda *x: inside(raw_of(*x)).loss, argnums=(0, 1, 2))(*given)
            leaves = [x.requires_grad_() for x in given]
            want = torch.autograd.grad(outside(raw_of(*leaves)).loss, leaves, materialize_grads=True)
            assert_close(made, want)
        for part in ("share", "level", "raw", "loss", "finite"):
            torch.testing.assert_close(inside.history[part], outside.history[part])
        assert inside.steps == 3
        torch.testing.assert_close(inside.state_dict()["average"], outside.state_dict()["average"])
        inside.accept(torch.tensor(False, device=device))
        assert inside.history["finite"].tolist() == [1, 1, 0]

    @IMPLS
    def test_vmap_is_refused(self, server: tuple[str, str]) -> None:
        impl, device = server
        goals = goal_set(impl, spill=0.5).to(device).double()

        def loss(*x: Tensor) -> Tensor:
            return goals(raw_of(*x)).loss

        for transform in (vmap(loss), vmap(grad(loss)), grad(lambda *x: vmap(loss)(*x).sum())):
            with pytest.raises(RuntimeError, match=r"^a GoalSet in training mode .* torch.vmap .*: call eval\(\)"):
                transform(*codes(device, 3))
        assert goals.steps == 0 and len(goals.history) == 0
        goals.eval()
        assert vmap(loss)(*codes(device, 3)).shape == (3,)

    @IMPLS
    @pytest.mark.parametrize(
        "learns", [{"d": bomkern.Calibrated()}, {"d": bomkern.Tracking()}, {"guard": bomkern.ShareGuard()}]
    )
    def test_what_learns_is_refused(self, server: tuple[str, str], learns: dict[str, Any]) -> None:
        impl, device = server
        goals = GoalSet(a=Minimize(1.0), **{"d": Minimize(1.0), **learns}, impl=impl).to(device)
        x = torch.rand(2, 4, device=device)

        def loss(x: Tensor) -> Tensor:
            return goals({"a": x[0], "d": x[1]}).loss

        before = {name: buffer.clone() for name, buffer in goals.named_buffers()}
        with pytest.raises(RuntimeError, match=r"cannot learn inside torch.func: call eval\(\) first"):
            grad(loss)(x)
        assert goals.steps == 0 and all(torch.equal(before[name], buffer) for name, buffer in goals.named_buffers())
        goals.eval()
        assert grad(loss)(x).shape == x.shape

    @IMPLS
    def test_functional_call(self, server: tuple[str, str]) -> None:
        """functional_call gives the gradient of parameters, and of an ensemble's parameters."""
        impl, device = server

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Linear(4, 4)
                self.goals = GoalSet(a=Minimize(1.0), b=Minimize(2.0), spill=0.5, impl=impl)

            def forward(self, x: Tensor) -> Tensor:
                y = self.net(x)
                return self.goals({"a": y.square().mean(1), "b": bomkern.covariance_penalty(y, impl=impl)}).loss

        model = Model().to(device).eval()
        x = codes(device, dtype=torch.float32)[0]
        weights = dict(model.named_parameters())
        made = grad(lambda w: functional_call(model, w, (x,)))({n: p.detach() for n, p in weights.items()})
        want = torch.autograd.grad(model(x), list(weights.values()))
        torch.testing.assert_close(list(made.values()), list(want))
        twins = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in weights.items()}
        both = vmap(grad(lambda w: functional_call(model, w, (x,))))(twins)
        torch.testing.assert_close([g[0] for g in both.values()], list(want))


@pytest.mark.skipif(select.extension is None, reason="for the compiled ops")
def test_the_ops_themselves() -> None:
    """A direct call of torch.ops keeps its gradient after its level has ended, as in a compiled graph."""
    _, mu, logvar = codes("cpu")
    table = bomkern.ConstraintTable(CONSTRAINTS, dtype=torch.float64)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: torch.ops.bomkern.gaussian_kl(x, logvar, 1, 0.0).sum(),
        lambda x: torch.ops.bomkern.min_goal(list(x.T[:3]), table.params, table.curves, 1)[0],
    ]
    for call in calls:
        leaf = mu.clone().requires_grad_()
        (want,) = torch.autograd.grad(call(leaf), leaf)
        value, pull = vjp(call, mu)
        assert_close(pull(torch.ones_like(value)), [want])

        def pulled(x: Tensor, call: Callable[[Tensor], Tensor] = call) -> Tensor:
            value, pull = vjp(call, x)
            return pull(torch.ones_like(value))[0].pow(3).sum()

        (first,) = torch.autograd.grad(call(leaf), leaf, create_graph=True)
        assert_close([grad(pulled)(mu)], torch.autograd.grad(first.pow(3).sum(), leaf))
        assert_close([jacrev(call)(mu), vmap(call)(mu[None])[0]], [want, call(mu)])


@pytest.mark.slow
@EACH
@IMPLS
def test_compiled_transforms(server: tuple[str, str], name: str) -> None:
    """Transforms compile to whole graphs. Triton refuses and says so."""
    impl, device = server
    many = codes(device, 2)

    def loss(*x: Tensor) -> Tensor:
        return total(CALLS[name](*x, impl))

    for transform, given in ((grad(loss), [x[0] for x in many]), (vmap(loss), many)):
        want = transform(*given)
        torch.compiler.reset()
        compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
        if impl == "triton" and name != "gaussian_total_correlation":
            with pytest.raises(Exception, match=r"cannot serve \w+ in a compiled torch.func transform: use impl='ref"):
                compiled(*given)
            torch.compiler.reset()
            compiled = torch.compile(transform, backend="aot_eager")
        torch.testing.assert_close(compiled(*given), want, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.skipif(select.why_not("gaussian_kl", "triton", "cuda") == "triton is not installed", reason="no triton")
def test_under_the_interpreter() -> None:
    run_tests("tests/dispatch/test_transforms.py", "triton-cpu and (not compiled or gaussian_kl)", TRITON_INTERPRET="1")
