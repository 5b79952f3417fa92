"""Test branch routing in PyTorch: graphs kept, autograd.grad, compile, fake tensors, transforms, processes."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bomkern import ConstraintTable, GoalSet, Minimize, min_goal_loss
from bomkern.common.process_group import several_ranks
from bomkern.common.reductions import REDUCTIONS
from bomkern.dispatch import routing, select
from tests.support.routing import (
    ALL,
    EACH_REDUCTION,
    EACH_WAY,
    IMPLS,
    NAMES,
    SET_IMPLS,
    Branches,
    check_same,
    gradients,
    named_goals,
    plain_goals,
    samples,
)
from tests.support.servers import COMPILED


@IMPLS
@EACH_WAY
def test_retained_graphs_and_losses_used_twice(server: tuple[str, str], make: Any) -> None:
    device = server[1]
    net, x = Branches().to(device), samples(device=device)
    loss = make(server, route="always")(net(x))
    loss.backward(retain_graph=True)
    once = [p.grad if p.grad is None else p.grad.clone() for p in net.parameters()]
    loss.backward()
    for p, before in zip(net.parameters(), once, strict=True):
        assert (p.grad is None) == (before is None)
        assert before is None or torch.equal(p.grad, 2 * before)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    net.zero_grad()
    loss = make(server, route="always")(net(x))
    (loss + 3 * loss).backward()
    for p, before in zip(net.parameters(), once, strict=True):
        assert (p.grad is None) == (before is None)
        assert before is None or torch.allclose(p.grad, 4 * before)


@IMPLS
@EACH_WAY
def test_autograd_grad(server: tuple[str, str], make: Any) -> None:
    device = server[1]
    net, x = Branches().to(device), samples(device=device)
    wanted = list(net.parameters())
    zeros = torch.autograd.grad(make(server, route="always")(net(x)), wanted, materialize_grads=True)
    plain = torch.autograd.grad(make(server, route="never")(net(x)), wanted)
    assert all(map(torch.equal, zeros, plain))
    some = torch.autograd.grad(make(server, route="always")(net(x)), wanted, allow_unused=True)
    check_same(some, plain, 4)
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(make(server, route="always")(net(x)), wanted)


@IMPLS
@EACH_WAY
@pytest.mark.parametrize("which", [0, 2, 3])
def test_goals_that_need_no_gradient(server: tuple[str, str], make: Any, which: int) -> None:
    device = server[1]
    net, x = Branches().to(device), samples(device=device)

    def bend(raw: list[Tensor]) -> list[Tensor]:
        return [value.detach() if k == which else value for k, value in enumerate(raw)]

    routed = gradients(make(server, route="always"), net, x, bend)
    plain = gradients(make(server, route="never"), net, x, bend)
    for ours, theirs in zip(routed, plain, strict=True):
        if ours is None:
            assert theirs is None or not theirs.any()
        else:
            assert theirs is not None and torch.equal(ours, theirs)


@IMPLS
def test_no_goal_needs_gradient(server: tuple[str, str]) -> None:
    raw = [torch.rand(3, device=server[1]) for _ in range(2)]
    assert not plain_goals(server, route="always")(raw).requires_grad
    with torch.no_grad():
        assert not plain_goals(server, route="always")([x.requires_grad_() for x in raw]).requires_grad


@IMPLS
def test_one_tensor_as_two_goals_and_views(server: tuple[str, str]) -> None:
    x = torch.rand(4, 2, device=server[1]).requires_grad_()
    for raw in ([x[:, 0], x[:, 0], x[:, 1]], list(x.unbind(1)), [x[:1, 0].expand(4), x[:, 1]]):
        ours, theirs = (torch.autograd.grad(plain_goals(server, route=r)(raw), x, retain_graph=True)[0] for r in WAYS)
        assert torch.equal(ours, theirs)


WAYS = ("always", "never")


@IMPLS
def test_statistics_may_be_written_to(server: tuple[str, str]) -> None:
    device = server[1]
    net, x = Branches().to(device), samples(device=device)
    for fill in (0.0, 1.0, torch.nan):
        net.zero_grad()
        loss, stats = min_goal_loss(net(x), Minimize(1.0), return_stats=True, impl=server[0], route="always")
        for part in stats[1:]:
            part.fill_(fill)
        loss.backward()
        ours = [p.grad for p in net.parameters()]
        check_same(ours, gradients(plain_goals(server, route="never"), net, x), 4)


@SET_IMPLS
def test_records_may_be_written_to(server: tuple[str, str]) -> None:
    device = server[1]
    net, x = Branches().to(device), samples(device=device)
    goals = GoalSet({n: Minimize(1.0) for n in NAMES}, route="always", impl=server[0]).to(device)
    for fill in (0.0, 1.0):
        net.zero_grad()
        out = goals(dict(zip(NAMES, net(x), strict=True)))
        out.record.fill_(fill)
        out.bottleneck.fill_(2)
        out.loss.backward()
        ours = [p.grad for p in net.parameters()]
        check_same(ours, gradients(named_goals(server, route="never"), net, x), 4)


@IMPLS
@EACH_WAY
def test_no_graph_outlives_its_loss(server: tuple[str, str], make: Any) -> None:
    device = server[1]
    net, goals = Branches().to(device), make(server, route="always")
    gc.collect()
    gc.disable()
    try:
        raw = net(samples(device=device))
        loss = goals(raw)
        loss.backward()
        kept = [weakref.ref(t) for t in (*raw, loss)]
        del raw, loss
        assert not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


def test_a_matrix_of_goals_is_one_branch() -> None:
    x = torch.tensor([[0.1, 0.9], [0.2, 0.8]]).requires_grad_()
    ours, theirs = (torch.autograd.grad(min_goal_loss(x, route=r), x)[0] for r in WAYS)
    assert torch.equal(ours, theirs) and not ours[:, 1].any()


# Unknown shares.


@IMPLS
@EACH_WAY
@pytest.mark.parametrize("route", ["auto", "always"])
def test_under_compile_nothing_is_routed(server: tuple[str, str], make: Any, route: str) -> None:
    device = server[1]
    torch._dynamo.reset()
    net, x = Branches().to(device), samples(device=device)
    goals = make(server, route=route)
    compiled = torch.compile(lambda x: goals(net(x)), fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    ours = [p.grad for p in net.parameters()]
    net.zero_grad()
    make(server, route="never")(net(x)).backward()
    for grad, p in zip(ours, net.parameters(), strict=True):
        assert grad is not None and torch.allclose(grad, p.grad, atol=1e-7)
    assert net.heads[2].weight.grad is not None


@COMPILED
@EACH_REDUCTION
def test_opcheck(reduction: str) -> None:
    goals = [torch.rand(8).requires_grad_() for _ in range(3)] + [torch.tensor(0.3).requires_grad_()]
    table = ConstraintTable([Minimize(1.0)] * 4)
    code = REDUCTIONS[reduction]
    tests = [name for name in torch.library._OPCHECK_DEFAULT_UTILS if "aot" not in name]
    for op in (torch.ops.bomkern.min_goal.default, torch.ops.bomkern.min_goal.stats):
        torch.library.opcheck(op, (goals, table.params, table.curves, code, -1), test_utils=tests)
    more = (table.params, table.curves, [0, 0, 1, 2], torch.tensor(0.0), code, None, False, -1)
    torch.library.opcheck(torch.ops.bomkern.goal_set.default, (goals, *more), test_utils=tests)


@COMPILED
@EACH_WAY
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_fake_tensors_are_all_reached(make: Any, impl: str) -> None:
    goals = make((impl, "cpu"), route="always")
    with FakeTensorMode(allow_non_fake_inputs=True):
        raw = [torch.rand(4).requires_grad_() for _ in range(3)] + [torch.rand(()).requires_grad_()]
        loss = goals(raw)
        loss.sum().backward()
    assert [tuple(x.grad.shape) for x in raw] == [(4,)] * 3 + [()]


@pytest.mark.parametrize("impl", [None, "reference"])
def test_meta_tensors_are_all_reached(impl: str | None) -> None:
    raw = [torch.rand(4, device="meta").requires_grad_() for _ in range(3)]
    min_goal_loss(raw, impl=impl, route="always").backward()
    assert all(x.grad is not None and x.grad.shape == (4,) for x in raw)


@IMPLS
def test_under_function_transforms(server: tuple[str, str]) -> None:
    impl, device = server
    raw = [x.detach() for x in Branches().to(device)(samples(device=device))]
    named = GoalSet({n: Minimize(1.0) for n in NAMES}, route="always", impl=impl).to(device).eval()
    for goals in (plain_goals(server, route="always"), lambda raw: named(dict(zip(NAMES, raw, strict=True))).loss):
        grads = torch.func.grad(goals)(raw)
        leaves = [x.clone().requires_grad_() for x in raw]
        plain = torch.autograd.grad(plain_goals(server, route="never")(leaves), leaves)
        assert all(map(torch.equal, grads, plain))


# Several processes.


def test_auto_leaves_nothing_out_where_others_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Branches(), samples()
    server = ("cpu" if select.extension else "reference", "cpu")
    assert not several_ranks()
    for world, expected in ((1, 4), (2, 0)):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda world=world: world)
        assert several_ranks() == (world == 2)
        assert routing.rows_too("auto") == routing.rows_too("always") == (world == 1)
        for make in ALL:
            grads = gradients(make(server), net, x)
            assert sum(g is None for g in grads) == expected
            assert sum(g is None for g in gradients(make(server, route="always"), net, x)) == 4
            assert sum(g is None for g in gradients(make(server, route="never"), net, x)) == 0
    assert not routing.rows_too("never")


# Routing breaks the promise of static_graph=True: a rank may lack a gradient that another rank has. It is not tested.
WRAPPINGS: tuple[dict[str, bool], ...] = ({}, {"find_unused_parameters": True})


def _rank(rank: int, port: int, folder: str) -> None:
    """Run one process of a DistributedDataParallel run, in which each process has another bottleneck branch."""
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found: dict[int, list[Tensor | None]] = {}
    for number, (how, route) in enumerate(itertools.product(WRAPPINGS, ("always", "auto", "never"))):
        net = nn.parallel.DistributedDataParallel(Branches(), **how)
        grads = found[number] = []
        for step in range(3):
            net.zero_grad()
            x = samples() + rank + step
            level = [4.0 if k == rank + (step == 2) else 0.0 for k in range(4)]
            min_goal_loss(net(x, level), Minimize(1.0), route=route).backward()
            grads += [p.grad if p.grad is None else p.grad.clone() for p in net.parameters()]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # destroying the group may abort


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Any) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = torch.multiprocessing.spawn(_rank, args=(port, str(tmp_path)), nprocs=2, join=False)
    running.join(timeout=120)
    for process in running.processes:
        process.join(timeout=60)
        assert not process.is_alive(), "hangs"
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    plain = first[2]
    assert all(g is not None for g in plain) and plain[2].any() and plain[4].any()  # gradients of both ranks' branches
    for one, other in zip(first.values(), second.values(), strict=True):
        for ours, theirs, want in zip(one, other, plain, strict=True):
            if ours is None or theirs is None:  # unused on every rank
                assert ours is None and theirs is None and not want.any()
            else:
                assert torch.equal(ours, theirs) and torch.allclose(ours, want, rtol=1e-6)
