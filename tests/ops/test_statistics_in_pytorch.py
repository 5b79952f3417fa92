"""Test the five statistics in PyTorch: compile, opcheck, fakes, syncs, poison, autograd's rules, bad input."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import bomkern
from bomkern import active_units, consistency_variance, covariance_penalty, gaussian_kl, latent_statistics
from bomkern.dispatch import schemas
from tests.support.processes import run_on_instruction_set, run_tests
from tests.support.statistics import (
    EVERY,
    OPS,
    Inputs,
    calls,
    codes,
    leaves,
    ramp,
    run,
    values_of,
    views,
)
from tests.support.syncs import CountSyncs

FILES = " ".join(f"tests/ops/test_{name}.py" for name in OPS)
COMPILED = ("cpu", "cuda")


def op_calls(batch: int, dims: int) -> dict[str, list[tuple[Inputs, tuple[Any, ...], dict[str, Any]]]]:
    """Return some calls of each op as torch.ops takes them: (inputs, numbers, keywords)."""
    z, mu, logvar = codes(batch, dims)
    given = views(batch, dims)
    written: dict[str, Any] = {
        "gaussian_kl": [((mu, logvar), (block, rho), {}) for block, rho in ((1, 0.0), (2, 0.5), (dims - 1, 0.5))],
        "consistency_variance": [(given, (1.0,), {}), ((torch.stack(given),), (0.5,), {})],
        "active_units": [((mu,), (0.1, 0.05), {})],
        "latent_statistics": [((z, mu, logvar), (0.1, 0.05), {})],
        "covariance_penalty": [
            ((z,), (normalize, per_sample), {"save": normalize == per_sample})
            for normalize in (False, True)
            for per_sample in (False, True)
        ],
    }
    return {name: written.get(name, [(op.make(batch, dims), op.numbers, {})]) for name, op in OPS.items()}


def arguments_of(name: str, inputs: Inputs, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    return (list(inputs), *numbers) if name == "consistency_variance" else (*inputs, *numbers)


def backward_arguments(name: str, inputs: Inputs, numbers: tuple[Any, ...], out: Inputs) -> list[tuple[Any, ...]]:
    """Return calls of NAME_backward on the results of NAME, some of them with gradients left out."""
    n = len(inputs)
    wants = [[True] * n] + ([[k == n - 1 for k in range(n)]] if n > 1 else [])
    if name in ("gaussian_kl", "consistency_variance"):
        return [(ramp(out[0]), *arguments_of(name, inputs, numbers), want) for want in wants]
    if name == "active_units":
        return [(*g, *inputs, *out[2:], *numbers) for g in ((out[0] * 2, out[1]), (None, out[1]), (out[0], None))]
    if name == "latent_statistics":
        every, some = [ramp(x) for x in out[:9]], [ramp(x) if k % 2 else None for k, x in enumerate(out[:9])]
        return [(g, *inputs, *out[9:], out[6], *numbers, want) for g in (every, some) for want in wants]
    if name == "covariance_penalty":
        return [(ramp(out[0]), *inputs, *out[1:], *numbers)]
    return OPS[name].backward(getattr(torch.ops.bomkern, f"{name}_backward"), inputs, out)


@pytest.mark.parametrize(("name", "batch", "dims"), [*((name, 9, 4) for name in OPS), ("covariance_penalty", 4, 6)])
def test_opcheck(name: str, batch: int, dims: int) -> None:
    if reason := bomkern.info()["ops"][name]["cpu"]["cpu"]:
        pytest.skip(reason)
    op, backward = getattr(torch.ops.bomkern, name).default, getattr(torch.ops.bomkern, f"{name}_backward").default
    for inputs, numbers, keywords in op_calls(batch, dims)[name]:
        torch.library.opcheck(op, arguments_of(name, leaves(inputs), numbers), keywords)
        saved = {"save": True} if keywords else {}
        out = values_of(op(*arguments_of(name, inputs, numbers), **saved))
        for arguments in backward_arguments(name, inputs, numbers, out):
            torch.library.opcheck(backward, arguments)


def described(tensors: Any) -> list[tuple[torch.Size, torch.dtype, tuple[int, ...]]]:
    return [(x.shape, x.dtype, x.stride()) for x in tensors]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtypes", [("float32",), ("float16", "float32"), ("bfloat16", "float64"), ("float64",)])
def test_fakes_match_the_reference(name: str, dtypes: tuple[str, ...]) -> None:
    """The ops' fake kernels, forward and backward, give the reference's shapes and dtypes without any kernel."""
    op, backward = getattr(torch.ops.bomkern, name).default, getattr(torch.ops.bomkern, f"{name}_backward").default
    for inputs, numbers, keywords in (call for size in ((9, 4), (4, 6)) for call in op_calls(*size)[name]):
        inputs = tuple(x.to(getattr(torch, dtypes[k % len(dtypes)])) for k, x in enumerate(inputs))
        # The op takes the numbers in the reference's order, so they can be passed by position.
        want = values_of(schemas.OPS[name].reference(*arguments_of(name, inputs, numbers)))
        with FakeTensorMode() as mode, torch.no_grad():
            fakes = tuple(mode.from_tensor(x) for x in inputs)
            saved = {"save": True} if keywords else {}
            out = values_of(op(*arguments_of(name, fakes, numbers), **saved))
            assert [(x.shape, x.dtype) for x in out[: len(want)]] == [(x.shape, x.dtype) for x in want]
            for arguments in backward_arguments(name, fakes, numbers, out):
                made = backward(*arguments)
                made = (made,) if isinstance(made, Tensor) else tuple(made)
                wanted = arguments[-1] if isinstance(arguments[-1], list) else [True]
                for x, grad, w in zip(inputs, made, wanted, strict=True):
                    assert grad.shape == (x.shape if w else (0,)) and grad.dtype == x.dtype


@EVERY
def test_fakes_match_what_runs(name: str, server: tuple[str, str]) -> None:
    impl, device = server
    for call in calls(name):
        real = leaves(OPS[name].make(8, 6), device=device)
        values, grads = run(call, real, impl)
        plain = [x.detach() for x in real]
        with FakeTensorMode() as mode:
            fakes = tuple(mode.from_tensor(x).requires_grad_() for x in plain)
            fake_values, fake_grads = run(call, fakes, impl)
        assert described(fake_values) == described(values) and described(fake_grads) == described(grads)


@EVERY
@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", True), pytest.param("inductor", None, marks=pytest.mark.slow)],  # a second B makes B symbolic
)
def test_compile_fullgraph(name: str, server: tuple[str, str], backend: str, dynamic: bool | None) -> None:
    """The compiled graph serves changing batches, with D below and above B."""
    impl, device = server
    op = OPS[name]
    torch._dynamo.reset()

    def step(*inputs: Tensor) -> Tensor:
        results = values_of(op.call(*(x * 1.5 for x in inputs), impl=impl))
        return sum(((k + 1) * x.square()).mean() for k, x in enumerate(results)) * 2  # type: ignore[return-value]

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for batch in (24, 40):
        ours, theirs = leaves(op.make(batch, 30), device=device), leaves(op.make(batch, 30), device=device)
        got, want = compiled(*ours), step(*theirs)
        assert torch.allclose(got, want, rtol=1e-5)
        got.backward()
        want.backward()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5 * b.grad.abs().max().item())


@EVERY
def test_no_host_sync(name: str, server: tuple[str, str]) -> None:
    impl, device = server
    for call in calls(name):
        for batch, dims in ((40, 6), (6, 40)):
            inputs = leaves(OPS[name].make(batch, dims), device=device)
            with CountSyncs() as counter:
                run(call, inputs, impl)
            assert not counter.seen


@EVERY
def test_every_element_is_written(name: str, server: tuple[str, str]) -> None:
    """Fresh buffers and workspaces are filled with NaN, and no result contains the filling."""
    impl, device = server
    # without warn_only cuBLAS would need more than the filling
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        for batch, dims in ((2, 2), (33, 6), (6, 34), (1030, 70)):
            for call in calls(name):
                inputs = OPS[name].make(batch, dims)
                for choice in (range(len(inputs)), [0], [len(inputs) - 1]):
                    some = leaves(inputs, device=device)
                    some = tuple(x if k in choice else x.detach() for k, x in enumerate(some))
                    values, grads = run(call, some, impl)
                    assert all(x.isfinite().all() for x in (*values, *grads))
    finally:
        torch.use_deterministic_algorithms(False)


@EVERY
def test_no_grad(name: str, server: tuple[str, str]) -> None:
    impl, device = server
    for call in calls(name):
        inputs = leaves(OPS[name].make(20, 6), device=device)
        want, _ = run(call, inputs, impl)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                values = values_of(call(*inputs, impl=impl))
            assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(values, want, strict=True))
        plain = values_of(call(*(x.detach() for x in inputs), impl=impl))
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(plain, want, strict=True))


@EVERY
def test_forward_mode_is_refused(name: str, server: tuple[str, str]) -> None:
    impl, device = server
    if impl not in COMPILED:
        pytest.skip("for the compiled implementations to refuse")
    inputs = tuple(x.to(device) for x in OPS[name].make(8, 4))
    for k in range(len(inputs)):  # each input is checked

        def alone(x: Tensor, k: int = k) -> Any:
            return OPS[name].call(*inputs[:k], x, *inputs[k + 1 :], impl=impl)

        with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode"):
            torch.func.jvp(alone, (inputs[k],), (inputs[k],))


@EVERY
def test_backward_twice_needs_retain_graph(name: str, server: tuple[str, str]) -> None:
    impl, device = server
    for call in calls(name):
        inputs = leaves(OPS[name].make(8, 4), device=device)
        value = sum(x.sum() for x in values_of(call(*inputs, impl=impl)))
        value.backward(retain_graph=True)
        first = inputs[0].grad.clone()  # type: ignore[union-attr]
        value.backward()
        assert torch.equal(inputs[0].grad, 2 * first)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()


@EVERY
def test_an_input_changed_before_backward_is_noticed(name: str, server: tuple[str, str]) -> None:
    """A changed input is noticed, or does not matter where eager PyTorch keeps its own copy."""
    impl, device = server
    for call in calls(name):
        own = leaves(OPS[name].make(8, 4), device=device)
        want = run(call, own, impl)[1]
        for k in range(len(own)):
            moved = [x * 1 for x in own]
            values = values_of(call(*moved, impl=impl))
            with torch.no_grad():
                moved[k].add_(1)
            try:
                got = torch.autograd.grad(values, own, [ramp(x) for x in values])
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
            else:
                copies = impl == "reference" or (name == "consistency_variance" and call is not OPS[name].call)
                assert copies and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@EVERY
def test_a_result_changed_before_backward_is_noticed_or_does_not_matter(name: str, server: tuple[str, str]) -> None:
    """A result that backward needs may be changed before, with an error or without effect."""
    impl, device = server
    for call in calls(name):
        own = leaves(OPS[name].make(8, 4), device=device)
        want = run(call, own, impl)[1]
        for k in range(len(values_of(call(*own, impl=impl)))):
            values = values_of(call(*own, impl=impl))
            with torch.no_grad():
                values[k].add_(1)
            try:
                got = torch.autograd.grad(values, own, [ramp(x) for x in values])
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
            else:
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), k


def matrix_cases(call: Any, names: tuple[str, ...], *, least: int = 1) -> list[Any]:
    """Return cases for each possible error of each [B, D] tensor: (call, arguments, error, first words)."""
    good = torch.rand(4, 3)
    wrong: list[tuple[Any, type[Exception], str]] = [
        *((None, TypeError, "must be a tensor, got NoneType"), ([0.5], TypeError, "must be a tensor, got list")),
        (torch.ones(4, 3, dtype=torch.int64), TypeError, "must be float16, bfloat16, float32 or float64"),
        (torch.ones(4, 3, dtype=torch.bool), TypeError, "must be float16, bfloat16, float32 or float64"),
        (torch.ones(4, 3, dtype=torch.complex64), TypeError, "must be float16, bfloat16, float32 or float64"),
        *((torch.rand(4, 3).to_sparse(), TypeError, "must be a dense"), (torch.rand(4), ValueError, "must have shape")),
        *((torch.rand(()), ValueError, "must have shape"), (torch.rand(2, 4, 3), ValueError, "must have shape")),
    ]
    cases = []
    for k, name in enumerate(names):
        own = list(wrong)
        if k:
            shape, device = "must have the shape of", f"is on (meta|cpu), {names[0].replace('[', '.')}"
            own += [(torch.rand(s), ValueError, shape) for s in ((3, 4), (1, 3), (4, 1), (5, 3))]
            own += [(torch.rand(4, 3, device="meta"), ValueError, device)]
        for bad, error, text in own:
            given = [bad if i == k else good for i in range(len(names))]
            cases.append((call, given, error, f"^{name.replace('[', '.').replace(']', '.')} {text}"))
    first = names[0].replace("[", ".").replace("]", ".")
    sizes = [((0, 3), "at least one sample"), ((4, 0), "at least one sample")]
    sizes += [((1, 3), f"at least {least} samples")] if least > 1 else []
    cases += [(call, [torch.rand(s)] * len(names), ValueError, f"^{first} must hold {text}") for s, text in sizes]
    if len(names) > 1:
        cases.append(
            (
                call,
                [good.to("meta"), *[good] * (len(names) - 1)],
                ValueError,
                "is on (cpu|meta), .* on (cpu|meta): move",
            )
        )
    return cases


def number_cases(call: Any, count: int, **wrong: list[tuple[Any, type[Exception]]]) -> list[Any]:
    """Return cases for each possible error of each number or name, with which the message must begin."""
    return [
        (functools.partial(call, **{name: bad}), [torch.rand(4, 6)] * count, error, f"^{name} must")
        for name, choices in wrong.items()
        for bad, error in choices
    ]


def of_views(*given: Any, **numbers: Any) -> Tensor:
    return consistency_variance(given, **numbers)


V, T = ValueError, TypeError
NOT_NUMBERS = [("x", T), (None, T), (True, T)]
THRESHOLD = [*NOT_NUMBERS, (float("nan"), V), (float("inf"), V)]
TEMPERATURE = [*NOT_NUMBERS, (float("nan"), V), (float("inf"), V), (0, V), (-0.1, V)]
IMPL = [("fast", V)]
RHO = [*NOT_NUMBERS, (1.0, V), (-0.5, V), (2, V), (float("nan"), V), (float("inf"), V)]
BAD = [
    *matrix_cases(gaussian_kl, ("mu", "logvar")),
    *matrix_cases(of_views, ("views[0]", "views[1]")),
    *matrix_cases(functools.partial(of_views, detach=True), ("views[0]", "views[1]", "views[2]")),
    *matrix_cases(active_units, ("mu",), least=2),
    *matrix_cases(latent_statistics, ("z", "mu", "logvar"), least=2),
    *matrix_cases(covariance_penalty, ("z",), least=2),
    *number_cases(
        gaussian_kl, 2, impl=IMPL, block_size=[(7, V), (2**40, V), (0, V), (-3, V), (2.0, T), (True, T), ("2", T)]
    ),
    *number_cases(functools.partial(gaussian_kl, block_size=3), 2, rho=RHO),
    *number_cases(of_views, 3, impl=IMPL, correction=[*NOT_NUMBERS, (3, V), (-1, V), (float("nan"), V), (2**40, V)]),
    *number_cases(active_units, 1, impl=IMPL, threshold=THRESHOLD, temperature=TEMPERATURE),
    *number_cases(latent_statistics, 3, impl=IMPL, threshold=THRESHOLD, temperature=TEMPERATURE),
    *number_cases(covariance_penalty, 1, impl=IMPL, reduction=[("mean", V), (None, V), (["sample"], V), (True, V)]),
    *((of_views, [torch.rand(4, 3)] * count, V, "^views must be 2 to 16") for count in (0, 1, 17)),
    *((consistency_variance, [torch.rand(n, 4, 3)], V, "^views must be 2 to 16") for n in (0, 1, 17)),
    *((consistency_variance, [torch.rand(s)], V, "^views must have shape") for s in ((4, 3), (4,), (2, 3, 4, 5))),
    *((consistency_variance, [bad], T, "^views") for bad in (None, 0.5)),
    *((consistency_variance, [torch.rand(s)], V, r"^views.0. must hold") for s in ((2, 0, 3), (2, 4, 0))),
    (functools.partial(consistency_variance, detach=True), [torch.rand(0, 4, 3)], V, "^views must be 2 to 16 tensors"),
    (consistency_variance, [torch.ones(2, 4, 3, dtype=torch.int32)], T, "^views.0. must be float16"),
    (consistency_variance, [{"a": torch.rand(4, 3), "b": torch.rand(4, 3)}], T, "^views"),
]


@pytest.mark.parametrize("impl", ["reference", None])
@pytest.mark.parametrize(("call", "given", "error", "text"), BAD)
def test_bad_input_is_named(impl: str | None, call: Any, given: list[Any], error: type[Exception], text: str) -> None:
    keywords = {} if "impl" in getattr(call, "keywords", {}) else {"impl": impl}
    with pytest.raises(error, match=text):
        call(*given, **keywords)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", OPS)
def test_cuda_graph_replay(name: str) -> None:
    for call in calls(name):
        inputs = leaves(OPS[name].make(64, 16), device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(call, inputs, "cuda")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            values, grads = run(call, inputs, "cuda")
        for scale in (1.0, 0.5):
            with torch.no_grad():
                inputs[0].mul_(scale)
            graph.replay()
            want = run(call, inputs, "cuda")
            assert all(torch.equal(a, b) for a, b in zip((*values, *grads), (*want[0], *want[1]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("simd", ["avx2", "baseline"])
def test_other_instruction_sets(simd: str) -> None:
    """Run the oracle tests on the narrower vectors of other CPUs."""
    run_on_instruction_set(simd, FILES, "cpu-cpu and not properties and not gradcheck")


@pytest.mark.slow
def test_triton_passes_the_same_oracle_tests() -> None:
    """Run the same files on Triton's interpreter, which must be chosen before triton is imported."""
    pytest.importorskip("triton")
    minutes = "larger or 1030 or 130-300 or properties or gradcheck or divergence or outlier"
    run_tests(FILES, f"triton-cpu and not ({minutes})", TRITON_INTERPRET="1")
