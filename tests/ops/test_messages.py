"""Test what errors about shapes, kinds, devices and numbers say: the input at fault, and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bomkern import (
    Anchored,
    Box,
    Calibrated,
    ConstraintTable,
    GoalSet,
    Group,
    Lower,
    Minimize,
    ShareGuard,
    Spill,
    Tracking,
    Upper,
    active_units,
    consistency_variance,
    covariance_penalty,
    gaussian_kl,
    gaussian_total_correlation,
    latent_statistics,
    min_goal_loss,
    probe,
    total_correlation,
)
from bomkern.common.blame import odd_length, odd_one
from tests.support.servers import servers

B, TOKENS = 8, 5
SPILL = r'take .mean\(\) of each, or use GoalSet\(..., spill="auto"\)'
NAMES = ("a", "b", "c")
# The bad goal beside two goals [8], the error, and the fix that it must name.
GOALS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "column": (lambda: torch.rand(B, 1), ValueError, r"write \.squeeze\(1\)$"),
    "row": (lambda: torch.rand(1, B), ValueError, r"write \.squeeze\(0\)$"),
    "tokens": (
        lambda: torch.rand(B, TOKENS),
        ValueError,
        r"write \.mean\(1\), or \(x \* w\)\.sum\(1\) / w\.sum\(1\) with a mask",
    ),
    "tokens first": (lambda: torch.rand(TOKENS, B), ValueError, r"write \.mean\(0\)$"),
    "image": (lambda: torch.rand(B, 3, 4, 4), ValueError, r"write \.flatten\(1\)\.mean\(1\)$"),
    "one": (lambda: torch.rand(1), ValueError, r"has shape \[1\], others have 8 samples: write \.squeeze\(0\)"),
    "flattened": (
        lambda: torch.rand(B * TOKENS),
        ValueError,
        r"has 40 samples, others have 8: write \.view\(8, -1\)\.mean\(1\) if .* 5 values; if not, " + SPILL,
    ),
    "ragged": (lambda: torch.rand(13), ValueError, "has 13 samples, others have 8: " + SPILL),
    "int": (lambda: 3, TypeError, r"must be a tensor, got int: write torch\.tensor\(3\.0, device=\.\.\.\)"),
    "float": (lambda: 0.5, TypeError, r"must be a tensor, got float: write torch\.tensor\(0\.5, device=\.\.\.\)"),
    "numpy": (
        lambda: np.ones(B),
        TypeError,
        r"must be a tensor, got ndarray: write torch\.as_tensor\(x, dtype=torch\.float32, device=\.\.\.\)",
    ),
    "numpy scalar": (lambda: np.float32(1), TypeError, r"got float32: write torch\.as_tensor"),
    "list": (lambda: [0.5] * B, TypeError, r"must be a tensor, got list: write torch\.tensor\(x, device=\.\.\.\)"),
    "list of tensors": (lambda: [torch.rand(())] * B, TypeError, r"got list: write torch\.stack\(x\)"),
    "integers": (lambda: torch.ones(B, dtype=torch.int64), TypeError, r"float64, got torch\.int64: write \.float\(\)"),
    "bools": (lambda: torch.ones(B, dtype=torch.bool), TypeError, r"float64, got torch\.bool: write \.float\(\)"),
    "complex": (
        lambda: torch.ones(B, dtype=torch.complex64),
        TypeError,
        r"got torch\.complex64: write \.abs\(\) or \.real",
    ),
    "sparse": (lambda: torch.rand(B).to_sparse(), TypeError, r"must be a dense tensor.*: write \.to_dense\(\)"),
}
BAD = pytest.mark.parametrize(("make", "error", "fix"), GOALS.values(), ids=GOALS)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("server", servers("min_goal"))
@BAD
def test_a_bad_goal_of_min_goal_loss_is_named_with_its_fix(
    make: Callable[[], Any], error: type[Exception], fix: str, server: tuple[str, str], place: int
) -> None:
    """The first goal is blamed like any other."""
    impl, device = server
    goals = [torch.rand(B, device=device) for _ in range(3)]
    bad = make()
    goals[place] = bad.to(device) if isinstance(bad, Tensor) else bad
    with pytest.raises(error, match=rf"^goals\[{place}\] .*{fix}"):
        min_goal_loss(goals, Minimize(1.0), impl=impl)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("server", servers("goal_set"))
@BAD
def test_a_bad_raw_value_of_a_goal_set_is_named_with_its_fix(
    make: Callable[[], Any], error: type[Exception], fix: str, server: tuple[str, str], place: int
) -> None:
    impl, device = server
    goals = GoalSet({name: Minimize(1.0) for name in NAMES}, impl=impl).to(device)
    raw: dict[str, Any] = {name: torch.rand(B, device=device) for name in NAMES}
    bad = make()
    raw[NAMES[place]] = bad.to(device) if isinstance(bad, Tensor) else bad
    with pytest.raises(error, match=rf"^the raw value of {NAMES[place]} .*{fix}"):
        goals(raw)
    assert goals.steps == 0


def test_fixes_are_right() -> None:
    """What the messages say to write gives goals that are accepted, with the values that one expects."""
    good, x = torch.rand(B), torch.rand(B, TOKENS)
    weight = torch.rand(B, TOKENS)
    fixed = [
        torch.rand(B, 1).squeeze(1),
        torch.rand(1, B).squeeze(0),
        torch.rand(1).squeeze(0),
        x.mean(1),
        (x * weight).sum(1) / weight.sum(1),
        x.t().mean(0),
        x.flatten().view(B, -1).mean(1),
        torch.rand(B, 3, 4, 4).flatten(1).mean(1),
        torch.as_tensor(np.ones(B), dtype=torch.float32, device="cpu"),
        torch.tensor([0.5] * B, device="cpu"),
        torch.ones(B, dtype=torch.int64).float(),
    ]
    assert torch.equal(fixed[3], fixed[6])
    for goal in fixed:
        assert min_goal_loss([good, goal], Minimize(1.0)).isfinite()


@pytest.mark.parametrize("compiled", [False, True])
def test_two_goals_are_both_named_with_their_lengths(compiled: bool) -> None:
    """Of two goals, one sample or a flattened goal is at fault; without a reason the second is."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return min_goal_loss([x, y], Minimize(1.0))

    torch._dynamo.reset()
    call = torch.compile(loss, backend="eager") if compiled else loss
    for lengths, text in (
        ((1, 8), r"goals\[0\] has shape \[1\], goals\[1\] has 8 samples: write \.squeeze\(0\)"),
        ((8, 1), r"goals\[1\] has shape \[1\], goals\[0\] has 8 samples: write \.squeeze\(0\)"),
        ((40, 8), r"goals\[0\] has 40 samples, goals\[1\] has 8: write \.view\(8, -1\)"),
        ((7, 8), r"goals\[1\] has 8 samples, goals\[0\] has 7: " + SPILL),
    ):
        with pytest.raises((ValueError, RuntimeError), match=text):
            call(*(torch.rand(n) for n in lengths))
    goals = GoalSet(a=Minimize(1.0), b=Minimize(1.0))
    with pytest.raises(ValueError, match=r"^the raw value of a has shape \[1\], the raw value of b has 8 samples"):
        goals({"a": torch.rand(1), "b": torch.rand(8)})


def test_the_one_that_differs_from_most_is_at_fault() -> None:
    assert odd_one([3, 8, 8]) == (0, 1, True) and odd_one([8, 3, 8]) == (1, 0, True)
    assert odd_one([8, 3]) == odd_one([8, 3, 5]) == odd_one([8, 3, 8, 3]) == (1, 0, False)
    assert odd_length([16, 8]) == (0, 1, False) and odd_length([8, 16]) == (1, 0, False)
    assert odd_length([0, 8]) == (1, 0, False)


def test_a_device_is_blamed_by_majority() -> None:
    here, away = torch.rand(B), torch.rand(B, device="meta")
    with pytest.raises(ValueError, match=r"^goals\[0\] is on meta, goals\[1\] on cpu: move them"):
        min_goal_loss([away, here, here], Minimize(1.0))
    goals = GoalSet({name: Minimize(1.0) for name in NAMES})
    with pytest.raises(ValueError, match=r"^the raw value of a is on meta, the raw value of b on cpu: move them"):
        goals({"a": away, "b": here, "c": here})
    with pytest.raises(ValueError, match=r"^the raw values are on meta, the GoalSet on cpu: call goals\.to\('meta'\)"):
        goals(dict.fromkeys(NAMES, away))


def test_a_tensor_of_goals_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"\[B, K\] or \[K\], got \[2, 3, 4\]: write \.flatten\(2\)\.mean\(2\)"):
        min_goal_loss(torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match=r"got \[\]: pass a 0-dim goal in a list"):
        min_goal_loss(torch.rand(()))
    with pytest.raises(
        ValueError, match=r"^goals\[0\] must have shape \[B\] or \[\], got \[8, 1\]: write \.squeeze\(1\)"
    ):
        min_goal_loss([torch.rand(B, 1)])


@pytest.mark.parametrize("server", servers("min_goal"))
def test_a_table_of_another_dtype(server: tuple[str, str]) -> None:
    impl, device = server
    for goal, table in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        given = ConstraintTable([Minimize(1.0)], device, table)
        other = ", or write .float" if goal is torch.float64 else "$"
        text = f"params must be {goal} for these goals, got {table}: make the ConstraintTable with dtype={goal}{other}"
        with pytest.raises(TypeError, match=text):
            min_goal_loss([torch.rand(4, dtype=goal, device=device)], given, impl=impl)


@pytest.mark.parametrize("server", servers("goal_set"))
def test_a_goal_that_is_alone(server: tuple[str, str]) -> None:
    impl, device = server
    goals = GoalSet(a=Minimize(1.0), impl=impl).to(device)
    with pytest.raises(ValueError, match=r"^the raw value of a must have shape .*, got \[8, 5\]: write \.mean\(1\)"):
        goals({"a": torch.rand(B, TOKENS, device=device)})


@pytest.mark.parametrize("impl", ["reference", None])
def test_more_than_64_goals(impl: str | None) -> None:
    fix = "pass the mean of similar goals as one goal, or make two losses and add them"
    for goals in (torch.rand(3, 65), [torch.rand(3)] * 65):
        with pytest.raises(ValueError, match=f"1 to 64 goals, got 65: {fix}"):
            min_goal_loss(goals, impl=impl)
    with pytest.raises(ValueError, match=f"1 to 64 goals, got 65: {fix}"):
        ConstraintTable([Minimize(1.0)] * 65)
    with pytest.raises(ValueError, match=f"got 65: each member of a Group counts; {fix}"):
        GoalSet(a=Minimize(1.0), g=Group(**{f"m{k}": Minimize(1.0) for k in range(64)}))


# Statistics.

STATISTICS: dict[str, tuple[Callable[..., Any], tuple[str, ...], str]] = {
    "total_correlation": (total_correlation, ("z", "mu", "logvar"), "z"),
    "gaussian_kl": (gaussian_kl, ("mu", "logvar"), "mu"),
    "consistency_variance": (
        lambda *v, **o: consistency_variance(v, **o),
        ("views[0]", "views[1]", "views[2]"),
        "views[0]",
    ),
    "active_units": (active_units, ("mu",), "mu"),
    "latent_statistics": (latent_statistics, ("z", "mu", "logvar"), "z"),
    "covariance_penalty": (covariance_penalty, ("z",), "z"),
}


def each(*names: str) -> list[Any]:
    """Return a case for every implementation of each statistic."""
    return [
        pytest.param(*STATISTICS[name], server.values[0], id=f"{name}-{server.id}", marks=server.marks)
        for name in names
        for server in servers(name)
    ]


@pytest.mark.parametrize(("call", "names", "first", "server"), each(*STATISTICS))
def test_a_bad_code_is_named_with_its_fix(
    call: Callable[..., Any], names: tuple[str, ...], first: str, server: tuple[str, str]
) -> None:
    impl, device = server
    for make, error, fix in (
        (lambda: torch.rand(4, 5, 3), ValueError, r"got \[4, 5, 3\]: write \.flatten\(0, 1\)"),
        (lambda: torch.rand(4, 3, 2, 2), ValueError, r"write \.flatten\(1\), or"),
        (lambda: torch.rand(4), ValueError, r"write \.unsqueeze\(1\)"),
        (lambda: torch.ones(4, 3, dtype=torch.int64), TypeError, r"got torch\.int64: write \.float\(\)"),
        (lambda: np.ones((4, 3)), TypeError, r"got ndarray: write torch\.as_tensor"),
    ):
        for place, name in enumerate(names):
            given: list[Any] = [torch.rand(4, 3, device=device) for _ in names]
            bad = make()
            given[place] = bad.to(device) if isinstance(bad, Tensor) else bad
            with pytest.raises(error, match=f"^{re.escape(name)} .*{fix}"):
                call(*given, impl=impl)
    if len(names) > 2:  # most have another shape than the first
        given = [torch.rand(6, 3, device=device), *(torch.rand(4, 3, device=device) for _ in names[1:])]
        text = rf"^{re.escape(first)} must have the shape of {re.escape(names[1])}, \[4, 3\], got \[6, 3\]"
        with pytest.raises(ValueError, match=text):
            call(*given, impl=impl)


@pytest.mark.parametrize(
    ("call", "names", "first", "server"),
    each("total_correlation", "active_units", "latent_statistics", "covariance_penalty"),
)
def test_the_last_batch_of_one(
    call: Callable[..., Any], names: tuple[str, ...], first: str, server: tuple[str, str]
) -> None:
    impl, device = server
    options = {"dataset_size": 100, "estimator": "mss"} if call is total_correlation else {}
    with pytest.raises(ValueError, match=rf"^{first} must hold at least 2 samples.*, got 1: .*drop_last=True"):
        call(*[torch.rand(1, 3, device=device)] * len(names), **options, impl=impl)


def test_a_covariance_of_too_few_samples() -> None:
    with pytest.raises(ValueError, match=r"more samples than dimensions, got \[1, 3\]: .*drop_last=True"):
        gaussian_total_correlation(torch.rand(1, 3))
    with pytest.raises(ValueError, match=r"got \[9, 2, 3\]: write \.flatten\(0, 1\)"):
        gaussian_total_correlation(torch.rand(9, 2, 3))


def test_views_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"got shape \[2, 4, 5, 3\]: write \.flatten\(1, -2\)"):
        consistency_variance(torch.rand(2, 4, 5, 3))
    assert consistency_variance(torch.rand(2, 4, 5, 3).flatten(1, -2)).shape == (20,)


# Numbers.

ONE: list[Any] = [np.float32(1), np.float64(1), np.int64(1), np.float16(1), np.array(1.0), np.array(1), Fraction(1)]
TAKE: dict[str, Callable[[Any], Any]] = {
    "Anchored": lambda x: Anchored(0, x),
    "Anchored ideal": lambda x: Anchored(x, 2),
    "halflife": lambda x: Anchored(halflife=x),
    "Minimize": Minimize,
    "Upper": lambda x: Upper(x, x),
    "Lower": lambda x: Lower(x, x),
    "Box": lambda x: Box(0, x),
    "Calibrated": lambda x: Calibrated(5, x, margin=x),
    "Tracking": lambda x: Tracking(x, x),
    "ShareGuard": lambda x: ShareGuard(0.1, x, rate=x),
    "Spill": lambda x: Spill(0.5, halflife=x),
    "temperature": lambda x: GoalSet(a=Minimize(1.0), temperature=x),
}


@pytest.mark.parametrize("take", TAKE.values(), ids=TAKE)
def test_numbers_of_numpy_are_numbers(take: Callable[[Any], Any]) -> None:
    for one in ONE:
        assert repr(take(one)) == repr(take(1.0))
    for bad in (True, np.bool_(True), np.array([1.0]), np.array(True), "1", None, 1j):
        with pytest.raises((TypeError, ValueError), match=r"must be a (Python )?number|must be 'max'|Anchored"):
            take(bad)
    with pytest.raises((TypeError, ValueError), match=r"write \.item\(\)"):
        take(torch.tensor(1.0))


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    for three in (3, np.int64(3), np.uint8(3), np.array(3)):
        assert repr(Calibrated(three)) == repr(Calibrated(3)) and type(Calibrated(three).until) is int
        x = [torch.rand(4, 6) for _ in range(3)]
        assert torch.equal(gaussian_kl(*x[:2], block_size=three), gaussian_kl(*x[:2], block_size=3))
        assert torch.equal(total_correlation(*x, three + 9), total_correlation(*x, 12))
    for bad in (3.0, np.float32(3), True, np.bool_(True), "3", np.array([3, 4])):
        with pytest.raises(TypeError, match="Calibrated: steps must be a whole number"):
            Calibrated(bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="block_size must be an int or None"):
            gaussian_kl(*x[:2], block_size=bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="steps must be a whole number"):
            probe(lambda: None, GoalSet(a=Minimize(1.0)), bad, state=[])  # type: ignore[arg-type]
    for call in (
        lambda n: Calibrated(n),
        lambda n: gaussian_kl(*x[:2], block_size=n),
        lambda n: probe(lambda: None, GoalSet(a=Minimize(1.0)), n, state=[]),
    ):
        with pytest.raises((TypeError, ValueError), match=r"write \.item\(\)"):
            call(torch.tensor(12))


def test_options_of_statistics_take_numbers_of_numpy() -> None:
    mu, logvar, z = (torch.rand(8, 4) for _ in range(3))
    half = np.float32(0.5)
    assert torch.equal(gaussian_kl(mu, logvar, 2, half), gaussian_kl(mu, logvar, 2, 0.5))
    assert active_units(mu, half, half) == active_units(mu, 0.5, 0.5)
    ours, theirs = latent_statistics(z, mu, logvar, half, half), latent_statistics(z, mu, logvar, 0.5, 0.5)
    assert torch.equal(ours.active, theirs.active)
    assert torch.equal(consistency_variance([mu, z], half), consistency_variance([mu, z], 0.5))


def test_anchors_are_measured_in_numbers_of_numpy() -> None:
    goals = GoalSet(x=Anchored("floor", np.float32(1), moving=True, halflife=1.0))
    goals.anchor(floor={"x": np.float32(0.5)})
    assert goals.anchors()["x"] == pytest.approx((0.5, 0.5))
    goals.remeasure({"x": (np.float32(1.0), np.array(3.0))})
    assert goals.anchors()["x"] == pytest.approx((0.75, 1.25))
