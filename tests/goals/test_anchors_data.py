"""Test which data `bomkern.anchors` takes, and that it names what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bomkern import GoalSet, anchors
from tests.support.anchors import both, drawn


@pytest.mark.parametrize(
    "given_as",
    [
        lambda y: y.float(),
        lambda y: y.half(),
        lambda y: y.bfloat16(),
        lambda y: y.T.contiguous().T,
        lambda y: y.requires_grad_(),
        lambda y: y.numpy(),
        lambda y: y.numpy()[::-1],
        lambda y: y.numpy().astype(">f4"),
        lambda y: y.numpy().astype(np.float16),
        lambda y: y.tolist(),
        lambda y: [row.tolist() for row in y],
        lambda y: list(y),
        lambda y: tuple(y.numpy()),
    ],
)
def test_any_kind_of_data(given_as: Any) -> None:
    y = (drawn(40, 3) * 16).round() / 16  # exact in every dtype but bfloat16
    state = torch.get_rng_state()
    taken = anchors.mse(given_as(y.clone()))
    assert torch.equal(state, torch.get_rng_state())
    assert both(taken)[1] == pytest.approx(both(anchors.mse(y))[1], rel=1e-2)
    assert isinstance(GoalSet(a=taken).anchors()["a"], tuple)


def test_read_only_arrays_and_numbers_of_python_keep_their_digits() -> None:
    array = np.array([0.1, 0.3, 0.7])
    array.flags.writeable = False
    assert both(anchors.mse(array)) == both(anchors.mse([0.1, 0.3, 0.7]))
    assert both(anchors.mse([0.1, 0.3, 0.7]))[1] == pytest.approx(np.var(array), rel=1e-14)


def test_data_far_from_zero_keep_their_digits() -> None:
    y = drawn(1000)
    assert both(anchors.mse(y + 1e8))[1] == pytest.approx(both(anchors.mse((y + 1e8) - 1e8))[1], rel=1e-10)


def test_data_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    y, images = drawn(10, 7), torch.sigmoid(drawn(9, 1, 8, 8))
    whole = both(anchors.mse(y)), both(anchors.bce(torch.sigmoid(y))), both(anchors.ssim(images))
    monkeypatch.setattr("bomkern.common.data_values.PART", 130)
    parts = both(anchors.mse(y)), both(anchors.bce(torch.sigmoid(y))), both(anchors.ssim(images))
    assert sum(parts, ()) == pytest.approx(sum(whole, ()), rel=1e-13)


def test_total_correlation_draws_from_a_generator_of_its_own() -> None:
    state = torch.get_rng_state()
    assert both(anchors.total_correlation(32, 3)) == both(anchors.total_correlation(32, 3))
    assert torch.equal(state, torch.get_rng_state())


Z = torch.zeros(8, 3)
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: anchors.mse(torch.ones(5)),
        ValueError,
        "no nadir follows from targets: all samples are alike.* leave the goal",
    ),
    (lambda: anchors.mse(torch.full((5, 2), 0.1)), ValueError, "no nadir follows from targets"),
    (lambda: anchors.mse(torch.tensor([1.0])), ValueError, r"targets must hold at least 2 samples.*shape \[1\]"),
    (lambda: anchors.mse(torch.zeros(4, 0)), ValueError, "targets must hold at least 2 samples"),
    (lambda: anchors.mse(torch.tensor([1.0, math.nan])), ValueError, "targets must be finite, got nan in 1 places"),
    (lambda: anchors.mse(torch.zeros(3, dtype=torch.uint8)), TypeError, "targets must have the unit.*x / 255"),
    (lambda: anchors.mse(torch.zeros(3, dtype=torch.bool)), TypeError, r"targets must have the unit.*\.float\(\)"),
    (lambda: anchors.mse(torch.zeros(3, dtype=torch.complex64)), TypeError, "targets must be real"),
    (lambda: anchors.mse("abc"), TypeError, "targets must be a tensor, a NumPy array or a sequence.*got str"),
    (lambda: anchors.mse([]), TypeError, "targets must be a tensor.*got an empty sequence"),
    (lambda: anchors.mse([[1.0], [1.0, 2.0]]), TypeError, "targets must hold numbers of one shape, got list"),
    (lambda: anchors.mse([1.0, 2.0], reduction="none"), ValueError, "reduction must be 'mean' or 'sum'.*'none'"),
    (lambda: anchors.mae([3.0, 3.0]), ValueError, "no nadir follows from targets"),
    (lambda: anchors.cross_entropy([1, 1]), ValueError, "no nadir follows from labels"),
    (lambda: anchors.cross_entropy([0.0, 1.0]), TypeError, r"labels must be whole numbers.*\.long\(\)"),
    (lambda: anchors.cross_entropy([True, False]), TypeError, "labels must be whole numbers.*anchors.bce"),
    (lambda: anchors.cross_entropy([0, -1]), ValueError, "labels must be at least 0, got -1: ignore_index"),
    (lambda: anchors.cross_entropy([0, 3], 3), ValueError, "labels must be below classes, 3, got 3"),
    (lambda: anchors.cross_entropy([-100, -100]), ValueError, "labels must hold at least one label"),
    (lambda: anchors.cross_entropy(), TypeError, "give labels, counts or classes"),
    (lambda: anchors.cross_entropy([0, 1], counts=[1, 1]), TypeError, "give labels or counts, got both"),
    (lambda: anchors.cross_entropy(counts=[1, -1]), ValueError, "counts must be .*values from -1 to 1"),
    (lambda: anchors.cross_entropy(counts=[1, 1], classes=3), ValueError, "one entry for each of the 3 classes, got 2"),
    (lambda: anchors.cross_entropy(classes=1), ValueError, "classes must be at least 2"),
    (lambda: anchors.bce([0.0, 2.0]), ValueError, r"labels must lie in \[0, 1\], got values from 0 to 2"),
    (lambda: anchors.bce(torch.tensor([0, 255], dtype=torch.uint8)), ValueError, r"labels must lie in \[0, 1\]"),
    (lambda: anchors.bce([0.3, 0.3]), ValueError, "no nadir follows from labels"),
    (lambda: anchors.per_token([4, 4]), ValueError, "no nadir follows from tokens"),
    (lambda: anchors.info_nce(1), ValueError, "batch must be at least 2, got 1"),
    (lambda: anchors.info_nce(2.0), TypeError, "batch must be a whole number, got float"),  # type: ignore[arg-type]
    (
        lambda: anchors.ssim(torch.zeros(2, 3, 4, 4)),
        ValueError,
        r"images must be \[N, C, H, W\] with sides of at least",
    ),
    (lambda: anchors.ssim(torch.zeros(2, 3)), ValueError, r"images must be \[N, C, H, W\]"),
    (lambda: anchors.ssim(torch.zeros(2, 3, 8, 8)), ValueError, "no nadir follows from images: each is of one colour"),
    (lambda: anchors.kl_budget(0), ValueError, "nats must be finite and above 0, got 0"),
    (lambda: anchors.covariance(2, 4), ValueError, "batch must be at least 3"),
    (lambda: anchors.covariance(8, 1), ValueError, "dims must be at least 2"),
    (lambda: anchors.variance_hinge(-1.0), ValueError, "target must be finite and above 0"),
    (lambda: anchors.total_correlation(8, 3, deviation=1.0), ValueError, "deviation must lie between 0 and 1"),
    (lambda: anchors.total_correlation(8, 3, posteriors=(Z, Z)), ValueError, "no nadir follows from posteriors"),
    (lambda: anchors.total_correlation(9, 3, posteriors=(Z, Z)), ValueError, r"posteriors: mu must be \[N, 3\]"),
    (lambda: anchors.total_correlation(8, 3, posteriors=(Z, Z[:, :2])), ValueError, "posteriors: logvar must be"),
    (
        lambda: anchors.residual(torch.zeros(5)),
        ValueError,
        "no nadir follows from source.*u = 0 solves the equation.*another",
    ),
    (lambda: anchors.boundary(torch.zeros(5)), ValueError, "no nadir follows from values.*scale=.*solution_scale"),
    (lambda: anchors.boundary(torch.zeros(5), scale=0), ValueError, "scale must be finite and above 0"),
    (lambda: anchors.solution_scale([0.0], [1.0]), ValueError, "no nadir follows from source"),
    (lambda: anchors.solution_scale([1.0], []), ValueError, "lengths must have one entry"),
    (lambda: anchors.solution_scale([1.0], [0.0]), ValueError, "lengths must be finite and above 0"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_bad_input_is_named(case: int) -> None:
    call, kind, match = REFUSED[case]
    with pytest.raises(kind, match=match):
        call()
