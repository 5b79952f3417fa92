"""Test that the recipes of CONTRIBUTING.md work: each toy example, on a copy of the tree, appears everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.processes import outside_xdist
from tests.support.recipes import (
    CONSTRAINT,
    FINDING,
    KERNELS,
    OP,
    POLICY,
    ROOT,
    TRAINER_GOAL,
    Edit,
    apply,
    copy_of_the_tree,
)

# By heading: the toy, the value of NAME, and the largest number of files.
RECIPES: dict[str, tuple[Mapping[str, Edit], str, int]] = {
    "To add an op": (OP, "mean_square", 20),
    "To add a policy": (POLICY, "", 2),
    "To add a constraint on an existing curve": (CONSTRAINT, "", 2),
    "To add a finding": (FINDING, "", 2),
    "To add a goal of the trainer": (TRAINER_GOAL, "", 2),
}


def files_of(heading: str, name: str) -> list[str]:
    """Return the files that a recipe names: each is the first word of a numbered line."""
    _, _, rest = (ROOT / "CONTRIBUTING.md").read_text().partition(f"### {heading}\n")
    section = re.split(r"^##", rest, flags=re.MULTILINE)[0]
    return [path.replace("NAME", name) for path in re.findall(r"^\d+\. `([^`]+)`", section, re.MULTILINE)]


@pytest.mark.parametrize("heading", RECIPES)
def test_the_toy_touches_the_files_that_the_recipe_names(heading: str) -> None:
    edits, name, most = RECIPES[heading]
    assert files_of(heading, name) == list(edits) and len(edits) <= most


def test_an_op_has_the_files_of_the_recipe() -> None:
    """The files of gaussian_kl, which newcomers read first, are where the recipe says."""
    for path in files_of("To add an op", "gaussian_kl"):
        text = (ROOT / path).read_text()
        assert "gaussian_kl" in text or path == "CHANGELOG.md", path


def run(tree: Path, *command: str) -> None:
    environment = {**outside_xdist(), "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    given = [sys.executable, *command]
    done = subprocess.run(given, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"


def pytest_of(tree: Path, keep: str, *files: str) -> None:
    run(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *files, "-k", keep)


OP_IS_SEEN = """
import importlib.util, sys, torch, bomkern
from torch._subclasses.fake_tensor import FakeTensorMode
assert bomkern.__file__.startswith(sys.argv[1])

x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
assert torch.equal(bomkern.mean_square(x, impl="reference"), x.square().mean(1))
assert torch.autograd.gradcheck(bomkern.mean_square, (x,))
with FakeTensorMode():
    assert torch.ops.bomkern.mean_square(torch.empty(5, 3)).shape == (5,)
for wrong, text in ((torch.rand(3), "x must have shape"), (None, "x must be a tensor")):
    try:
        bomkern.mean_square(wrong)
        raise SystemExit("bad input was taken")
    except (TypeError, ValueError) as error:
        assert text in str(error)
why = bomkern.info()["ops"]["mean_square"]["cpu"]
assert why["reference"] is None and why["cpu"] and "no Triton kernel" not in why["triton"]
assert torch.ops.bomkern.mean_square_triton.default and torch.ops.bomkern.mean_square_reference.default

from tests.fuzz.running import OPS, draw, failure_of
assert all(failure_of(draw(0, k, "mean_square", "reference")) is None for k in range(5))
from tests.dispatch.test_transforms import CALLS
from tests.support.derivatives import PROBLEMS
from tests.native.test_cuda_offline import ACCESSES, COUNTS
assert all("mean_square" in each for each in (OPS, CALLS, PROBLEMS, COUNTS, ACCESSES))
if importlib.util.find_spec("triton"):
    from tests.support.stub_cuda.cases import CASES, LAUNCHES
    assert {case.kind for case in CASES["mean_square"]} == set(LAUNCHES["mean_square"])

from bench import kernels, predictions
from bench.ops import bench_guard
from bench.report import page, write
assert "mean_square" in [case.op for case, _, _ in kernels.cases()]
assert "mean_square" in [case.op for case, _ in bench_guard.CASES]
assert "mean_square" in {plan.case.op for plan in predictions.PLANS}
assert "mean_square" in page.CASES and "mean_square" in write.SHOWN
sys.path[:0] = ["tools", "docs"]
import build_extension, gpu_stages, hooks, sanitize
assert "mean_square" in gpu_stages.BENCHES and "mean_square" in sanitize.OPS and "mean_square" in sanitize.TESTS
assert {"mean_square": "ops/mean_square.md"} in hooks.ops_navigation()
assert {"csrc/mean_square.cpp", "kernels/mean_square/cpu_baseline.cpp"} <= {*build_extension.sources(".cpp")}
"""


def test_an_op(tmp_path: Path) -> None:
    copy_of_the_tree(tmp_path)
    apply(KERNELS, tmp_path)
    apply(OP, tmp_path)
    run(tmp_path, "-c", OP_IS_SEEN, str(tmp_path))
    shared = "tests/ops/test_statistics_in_pytorch.py"
    pytest_of(tmp_path, "mean_square and (oracle or fakes)", "tests/ops/test_mean_square.py", shared)
    pytest_of(tmp_path, "public_name or navigation or every_case", "tests/tools/test_docs.py")


POLICY_IS_SEEN = """
import torch, bomkern
from bomkern.goals.policies import Cooling
goals = bomkern.GoalSet(a=Cooling(2.0), b=bomkern.Group(c=Cooling(3.0), d=bomkern.Minimize(1.0)))
for _ in range(2):
    raw = torch.rand(3, 4, requires_grad=True)
    goals({"a": raw[0], "b": {"c": raw[1], "d": raw[2]}}).loss.backward()
assert goals.anchors()["a"] == (0.0, 1.0) and "Cooling(scale=2)" in str(goals)
"""


def test_a_policy(tmp_path: Path) -> None:
    copy_of_the_tree(tmp_path)
    apply(POLICY, tmp_path)
    run(tmp_path, "-c", POLICY_IS_SEEN)
    pytest_of(tmp_path, "Cooling or example", "tests/goals/test_policies.py")


CONSTRAINT_IS_SEEN = """
import torch, bomkern
from bomkern.constraints import Near
from tests.fuzz.running import draw, failure_of
from tests.ops.test_properties_goals import constraints_of
assert Near in map(type, constraints_of(10, 0))
drawn = [draw(0, k, "min_goal", "reference") for k in range(60)]
with_it = [case for case in drawn if "Near" in str(case.options.get("constraints"))]
assert with_it and all(failure_of(case) is None for case in with_it[:3])
goals = bomkern.GoalSet(a=Near(0.5, 1.0), b=bomkern.Minimize(1.0))
for _ in range(30):
    raw = torch.rand(2, 4, requires_grad=True)
    goals({"a": raw[0], "b": raw[1]}).loss.backward()
assert "Near(healthy=0.5, margin=1)" in str(goals) and "a" in str(bomkern.diagnose(goals.history))
"""


def test_a_constraint(tmp_path: Path) -> None:
    copy_of_the_tree(tmp_path)
    apply(CONSTRAINT, tmp_path)
    run(tmp_path, "-c", CONSTRAINT_IS_SEEN)
    pytest_of(tmp_path, "Near or every_constraint", "tests/ops/test_constraints.py")


FINDING_IS_SEEN = """
import sys
from pathlib import Path
import torch
from bomkern import cli, diagnose
from bomkern.diagnosis.registry import KINDS
from tests.support.histories import T, flat, written
history = written({"a": torch.full((T,), 0.5), "b": flat(0.4, T, 1)}, {"a": 0.5, "b": 0.5})
assert diagnose(history)[0].kind == "stuck" and "stuck" in KINDS
folder = Path(sys.argv[1])
history.save(folder / "history.pt")
assert cli.main(["diagnose", str(folder)]) == 0
page = (folder / "report.html").read_text(encoding="utf-8")
assert "stuck: a" in page and "raw never changes" in page
sys.path.insert(0, "docs")
import hooks
assert any(row.startswith("| stuck | raw never changes | The raw value") for row in hooks.findings())
"""


def test_a_finding(tmp_path: Path) -> None:
    tree, folder = tmp_path / "tree", tmp_path / "run"
    folder.mkdir()
    copy_of_the_tree(tree)
    apply(FINDING, tree)
    run(tree, "-c", FINDING_IS_SEEN, str(folder))
    pytest_of(tree, "stuck or kind", "tests/diagnosis/test_diagnose.py", "tests/diagnosis/test_registry.py")


TRAINER_GOAL_IS_SEEN = """
import sys
from pathlib import Path
from bomkern.train import loop, presets, terminal
from bomkern.train.nine_goals import GOALS
from tests.support.training import config
assert len(GOALS) == 10 and all("brightness" in presets.policies(preset, 8, 3) for preset in ("moving", "auto"))
summary = loop.train(config(Path(sys.argv[1]), steps=2, log_every=1))
assert 0 < summary["raw"]["brightness"] and list(summary["share"]) == list(GOALS)
page = (Path(sys.argv[1]) / "report.html").read_text(encoding="utf-8")
assert "brightness" in page and "brightness" in terminal.report(summary, "")
"""


def test_a_goal_of_the_trainer(tmp_path: Path) -> None:
    pytest.importorskip("lightning_fabric")
    tree = tmp_path / "tree"
    copy_of_the_tree(tree)
    apply(TRAINER_GOAL, tree)
    run(tree, "-c", TRAINER_GOAL_IS_SEEN, str(tmp_path / "run"))
    pytest_of(tree, "brightness or anchor", "tests/train/test_nine_goals.py")


@pytest.mark.parametrize("left_out", ["bomkern/dispatch/triton/mean_square.py", "bench/cases.py", "docs/api.md"])
@pytest.mark.slow
def test_a_file_that_is_left_out_is_missed(left_out: str, tmp_path: Path) -> None:
    copy_of_the_tree(tmp_path)
    apply(KERNELS, tmp_path)
    apply({path: edit for path, edit in OP.items() if path != left_out}, tmp_path)
    with pytest.raises(AssertionError):
        run(tmp_path, "-c", OP_IS_SEEN, str(tmp_path))
        pytest_of(tmp_path, "public_name", "tests/tools/test_docs.py")
