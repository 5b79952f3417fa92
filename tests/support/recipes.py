"""A toy example for each recipe of CONTRIBUTING.md: the edits of each file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("bench", "bomkern", "csrc", "docs", "kernels", "tests", "tools")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "mkdocs.yml", "pyproject.toml", "setup.py")
Edit = Callable[[str], str]


def new(text: str) -> Edit:
    def edit(before: str) -> str:
        assert not before, "the file is there already"
        return text.lstrip("\n")

    return edit


def put(*pairs: tuple[str, str]) -> Edit:
    """Put each text before the first occurrence of its anchor, or at the end if the anchor is empty."""

    def edit(before: str) -> str:
        for anchor, text in pairs:
            assert anchor in before, f"no {anchor!r}"
            place = before.index(anchor) if anchor else len(before)
            before = before[:place] + text + before[place:]
        return before

    return edit


def copy_of_the_tree(to: Path) -> None:
    """Copy the files that recipes edit and that their checks read."""
    for name in FOLDERS:
        kept = shutil.ignore_patterns("__pycache__", "*.png", "*.so")
        shutil.copytree(ROOT / name, to / name, ignore=kept)
    for name in FILES:
        shutil.copy2(ROOT / name, to / name)
    for built in (ROOT / "bomkern").glob("_C*.so"):
        (to / "bomkern" / built.name).symlink_to(built.resolve())
    if not (to / "bomkern" / "kernels").exists():
        (to / "bomkern" / "kernels").symlink_to(Path("..") / "kernels")


def apply(edits: Mapping[str, Edit], tree: Path) -> None:
    for name, edit in edits.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(edit(path.read_text() if path.exists() else ""))


# The op mean_square: the mean of the squares of each row. Without C++ and CUDA, because nothing is compiled here.

KERNELS = {
    "kernels/mean_square/__init__.py": new('"""Kernels of mean_square."""\n'),
    "kernels/mean_square/cpu_baseline.cpp": new("// The kernels for the CPU.\n"),
    "kernels/mean_square/cuda.cu": new("// The kernels for CUDA.\n"),
}
OP: dict[str, Edit] = {
    "bomkern/reference/statistics.py": put(
        (
            "",
            '''

def mean_square(x: Tensor) -> Tensor:
    """The mean of the squares of each row: [B]."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(1)
''',
        )
    ),
    "bomkern/dispatch/fakes.py": put(
        (
            "",
            """

def mean_square(x: Tensor) -> Tensor:
    batch, _, dtype = check_matrices(x=x)
    return x.new_empty([batch], dtype=dtype)


def mean_square_backward(grad: Tensor, x: Tensor) -> Tensor:
    return gradient_of(x)
""",
        )
    ),
    "bomkern/dispatch/schemas.py": put(
        (
            "# In the order of `bomkern.info`.",
            """MEAN_SQUARE = Op(
    forward=Schema("mean_square(Tensor x) -> Tensor", fakes.mean_square),
    backward=Schema("mean_square_backward(Tensor grad, Tensor x) -> Tensor", fakes.mean_square_backward),
    reference=statistics.mean_square,
    check=lambda x: check_matrices(x=x),
    definition=("mean_square_reference(Tensor x) -> Tensor", statistics.mean_square),
)

""",
        ),
        ("*(LATENT_STATISTICS,", "MEAN_SQUARE,\n        "),
    ),
    "bomkern/dispatch/triton/mean_square.py": new('''
"""Ops, fakes and autograd of `mean_square` by Triton."""

from typing import Any

import torch
from torch import Tensor

from ...reference.statistics import mean_square as definition
from .. import fakes
from .launcher import guard, load
from .library import by_reference, register


def _forward(x: Tensor) -> Tensor:
    out = fakes.mean_square(x)
    with guard(x):
        load("mean_square", x.device.type).launch_forward(x, out)
    return out


def _backward(grad: Tensor, x: Tensor) -> Tensor:
    out = fakes.mean_square_backward(grad, x)
    with guard(x):
        load("mean_square", x.device.type).launch_backward(grad, x, out)
    return out


_library = register(
    "mean_square",
    ("(Tensor x) -> Tensor", _forward, fakes.mean_square),
    ("(Tensor grad, Tensor x) -> Tensor", _backward, fakes.mean_square_backward),
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lambda ctx, grads, want: [torch.ops.bomkern.mean_square_triton_backward(grads[0], *ctx.saved_tensors)],
    lambda ctx, grads, want: by_reference(ctx.saved_tensors, definition, grads, want),
)


def mean_square(x: Tensor) -> Any:
    return torch.ops.bomkern.mean_square_triton(x)
'''),
    "csrc/mean_square.cpp": new("// Checks, autograd and dispatch of mean_square.\n"),
    "bomkern/ops/mean_square.py": new('''
"""`mean_square`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..common.checks import check_matrices
from ..dispatch import select


def mean_square(x: Tensor, *, impl: str | None = None) -> Tensor:
    """The mean of the squares of each row: [B, D] to [B]."""
    check_matrices(x=x)
    serve: Callable[..., Tensor] = select.resolve("mean_square", x.device.type, impl)
    return serve(x)
'''),
    "bomkern/__init__.py": put(
        ("from .ops.min_goal import", "from .ops.mean_square import mean_square\n"),
        ('    "min_goal_loss",\n', '    "mean_square",\n'),
    ),
    "tests/support/statistics.py": put(
        (
            '        Op("covariance_penalty"',
            '        Op("mean_square", lambda b, d: codes(b, d)[:1], bomkern.mean_square, ("x",)),\n',
        )
    ),
    "tests/ops/test_mean_square.py": new('''
"""mean_square: every implementation against the reference in float64."""

import pytest
from tests.support.servers import servers
from tests.support.statistics import OPS, SHAPES, check


@pytest.mark.parametrize("server", servers("mean_square"))
@pytest.mark.parametrize(("batch", "dims"), SHAPES)
def test_oracle(server: tuple[str, str], batch: int, dims: int) -> None:
    check(OPS["mean_square"].call, OPS["mean_square"].make(batch, dims), server)
'''),
    "tests/fuzz/statistics.py": put(
        (
            "OPS: tuple[Op, ...] = (",
            """class MeanSquare(Op):
    name = "mean_square"
    needs: ClassVar = {"B": 1, "D": 1}
    per_sample = True

    def draw(self, source: Random, tiny: bool) -> Drawn:
        return matrix_sizes(source, tiny), [tensor(source, "x", "BD", "code")], {}

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        return {"value": bomkern.mean_square(*tensors, impl=impl)}


""",
        ),
        ("GaussianKL(), ConsistencyVariance()", "MeanSquare(), "),
    ),
    "tests/support/stub_cuda/cases.py": put(
        ("CASES: dict", "def mean_square_cases() -> list[Case]:\n    return hows(*MEAN_SQUARE, 24, 1)\n\n\n"),
        ("CASES: dict", 'MEAN_SQUARE = "mean_square", "always", 90, triton_ops.mean_square\n'),
        ('    "covariance_penalty": covariance', '    "mean_square": mean_square_cases(),\n'),
        ('    "covariance_penalty": {  # PyTorch', '    "mean_square": {"always": (1, 1, 0, 0)},\n'),
    ),
    "tests/native/cuda_emulator/check_mean_square.cpp": new("// Runs mean_square's CUDA kernels under the emulator.\n"),
    "tests/native/test_cuda_offline.py": put(
        ('    "covariance_penalty": 20,', '    "mean_square": 10,\n'),
        (
            "    **dict.fromkeys(",
            '    "mean_square": streaming("forward_kernel backward_kernel", "backward_kernel"),\n',
        ),
    ),
    "tests/native/sanitizers/cpu_rows.cpp": put(("", "// A call of the CPU kernels of mean_square.\n")),
    "bench/ops/bench_mean_square.py": new('''
"""mean_square against eager PyTorch and torch.compile, and its share of a copy's bandwidth."""

from typing import Any

import torch
from torch import Tensor

import bomkern
from bench.harness import Case, Inputs, Size, in_turn, measure, sizes_and, sizes_at, traffic
from bench.regimes import CODES, SIZES, codes
from bench.report.write import SHOWN


def samples(regime: str, B: int, D: int) -> Inputs:
    return codes(regime, B, D)[:1]


def plain(x: Tensor) -> Tensor:
    return x.square().mean(1)


CASE = Case("mean_square", samples, bomkern.mean_square, plain, torch.mean, traffic(1), regimes=CODES)


@sizes_and(SIZES, regimes=CASE.regimes, at=SHOWN["mean_square"])
def test_peers(benchmark: Any, size: Size, regime: str, direction: str, name: str) -> None:
    measure(benchmark, CASE, name, size, direction, regime)


@sizes_at(SIZES, SHOWN["mean_square"])
def test_regimes_in_turn(benchmark: Any, size: Size) -> None:
    in_turn(benchmark, CASE, size)
'''),
    "bench/cases.py": put(
        (
            '    "covariance_penalty": Benches(',
            '    "mean_square": Benches("busy and idle", {"": "`mean_square`"}, {"": (512, 65536)}),\n',
        )
    ),
    "docs/ops/mean_square.md": new(
        "# mean_square\n\n## API\n\n::: bomkern.mean_square\n\n## Numbers\n\n<!-- bench mean_square -->\n"
    ),
    "docs/api.md": put(("[`covariance_penalty`]", "[`mean_square`][bomkern.mean_square], ")),
    "CHANGELOG.md": put(("- `gaussian_kl`: `block_size`", "- `mean_square`.\n")),
}

POLICY: dict[str, Edit] = {
    "bomkern/goals/policies.py": put(
        (
            "class Anchored(Policy):",
            '''class Cooling(Policy):
    """The scale shrinks from step to step."""

    until = None

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        super().__init__(Minimize(scale), scale=scale)

    def update(self, raw: Tensor, state: Tensor, step: Tensor) -> Found:
        return torch.zeros_like(state[0]), self.scale / (1 + step.to(state.dtype))


''',
        )
    ),
    "tests/goals/test_policies.py": put(
        ('    "Fixed": lambda', '    "Cooling": lambda: policies.Cooling(2.0),\n'),
        ("\nSTEPS = ", "from bomkern.goals import policies\n"),
    ),
}

CONSTRAINT: dict[str, Edit] = {
    "bomkern/constraints.py": put(
        (
            "def check_constraints(",
            '''class Near(Constraint):
    """Score ``exp(-|x - healthy| / margin)``."""

    curve = LINEAR
    __slots__ = ()

    def __init__(self, healthy: float, margin: float) -> None:
        healthy, margin = _number("Near", "healthy", healthy), _positive("Near", "margin", margin)
        self._freeze((healthy, 1 / margin, -1 / margin, 0.0), healthy=healthy, margin=margin)


''',
        )
    ),
    "tests/ops/test_constraints.py": put(
        ("    (Lower(-0.5, 2.0)", "    (Near(0.5, 2.0), lambda x: math.exp(-abs(x - 0.5) / 2)),\n"),
        ("\n\ndef box_score(", "from bomkern.constraints import Near\n"),
    ),
}

FINDING: dict[str, Edit] = {
    "bomkern/diagnosis/one_goal.py": put(
        (
            "",
            '''

STUCK = Kind(
    "stuck",
    weight=0.99,
    meaning="raw never changes",
    explanation="The raw value of the goal is the same in every step.",
)


@detects(STUCK, each="goal")
def stuck(run: RunView, g: int) -> Iterator[Finding]:
    """A raw value that is the same in every step, as of a goal that nothing trains."""
    for k in run.members(g):
        values = run.values(k)
        if len(values) and values.min() == values.max():
            text = f"{when(run, (0, run.rows))}: raw {number(values[0].item())} in every step"
            change = f"check that {run.columns[k].name} depends on the model"
            yield make(run, STUCK, (g,), (0, run.rows), 1.0, text, change)
''',
        )
    ),
    "tests/diagnosis/test_diagnose.py": put(
        (
            "",
            """

def test_a_goal_whose_raw_value_never_changes_is_stuck() -> None:
    raw = {"a": torch.full((T,), 0.5), "b": flat(0.4, T, 1)}
    assert only(written(raw, {"a": 0.5, "b": 0.5}), "stuck").goals == ("a",)
    assert "stuck" not in kinds(locked())
""",
        )
    ),
}

TRAINER_GOAL: dict[str, Edit] = {
    "bomkern/train/nine_goals.py": put(
        (
            "class Step(NamedTuple):",
            '''def brightness(recon: Tensor, image: Tensor, trivial: Trivial) -> Tensor:
    """How far the mean brightness is off. Ideal 0; nadir 1, another image's."""
    return (recon.mean((1, 2, 3)) - image.mean((1, 2, 3))).square() / trivial.colour


''',
        ),
        (
            '    Goal("realism"',
            '    Goal("brightness", lambda s: lazy(brightness, s.out.recon, s.image, s.trivial), 0.0, 1.0),\n',
        ),
    ),
    "tests/train/test_nine_goals.py": lambda before: put(
        (
            "",
            """

def test_brightness_is_nothing_for_the_same_image(trivial: goal.Trivial) -> None:
    assert goal.brightness(pictures(), pictures(), trivial).abs().max() == 0
""",
        )
    )(before.replace("len(goal.GOALS) == 9", "len(goal.GOALS) == 10")),
}
