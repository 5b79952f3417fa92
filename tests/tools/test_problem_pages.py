"""Test that the pages of docs/problems say what the study in bench/policies does."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.pages import code_of

for needed in ("sklearn", "skimage"):
    pytest.importorskip(needed)
from bench.policies.problems import PROBLEMS  # noqa: E402

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "problems"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "index.md")
# The study divides these raw values by a constant.
OTHER_UNITS = {"digits": ("reconstruction", "decorrelation")}
NEAR = 0.12  # anchors are made of the training split in the study, and of all data or of other points on a page


def problems_of(page: Path) -> dict[str, str]:
    """Return the problems that a page has the results of, and their titles."""
    return dict(re.findall(r"^<!-- study (\S+): (.*) -->$", page.read_text(), re.MULTILINE))


def test_every_problem_is_on_a_page() -> None:
    shown = {name: title for page in PAGES for name, title in problems_of(page).items()}
    assert shown == {name: problem.title for name, problem in PROBLEMS.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_of_one_problem_and_shows_its_source(page: Path) -> None:
    names = list(problems_of(page))
    main = PROBLEMS[names[0]]
    assert len({PROBLEMS[name].family for name in names} - {PROBLEMS["tasks13"].family}) <= 1
    assert f"`python -m bench.policies --data {' '.join(names)}`" in page.read_text()
    source = Path(inspect.getsourcefile(main) or "").relative_to(ROOT)
    assert f"<!-- code {source}: {main.__name__} -->" in page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_the_anchors_of_the_study(page: Path) -> None:
    name = next(iter(problems_of(page)))
    names: dict[str, Any] = {}
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        exec(compile(code_of(page), str(page), "exec"), names)
    told, meant = names["goals"].anchors(), PROBLEMS[name].anchors
    assert list(told) == list(meant)
    for goal, (ideal, scale) in told.items():
        unit = (ideal + scale) / meant[goal].nadir if goal in OTHER_UNITS.get(name, ()) else 1.0
        assert ideal / unit == pytest.approx(meant[goal].ideal, rel=1e-4, abs=1e-6), goal
        assert (ideal + scale) / unit == pytest.approx(meant[goal].nadir, rel=NEAR), goal


def test_the_index_has_the_goals_and_the_measure_of_each_problem() -> None:
    rows = re.findall(r"^\| \[.*?\]\((\w+\.md)\) \| (\d+).*? \| (.*) \|$", (FOLDER / "index.md").read_text(), re.M)
    assert sorted(page for page, _, _ in rows) == [page.name for page in PAGES]
    for page, goals, measure in rows:
        problem = PROBLEMS[next(iter(problems_of(FOLDER / page)))]
        assert (int(goals), measure) == (len(problem.anchors), problem.measure.says.partition(",")[0])


def test_the_equations_pages_are_right_about_gradient_norms() -> None:
    pytest.importorskip("torchjd")
    from bench.policies.arms import ARMS

    runs = [json.loads(line) for line in (ROOT / "bench" / "results" / "policies.jsonl").read_text().splitlines()]
    for data in ("helmholtz", "burgers", "poisson"):
        errors: dict[str, list[float]] = {}
        for r in runs:
            if r["data"] == data and r["fault"] == "none" and not r["arm"].startswith("sum "):
                errors.setdefault(r["arm"], []).append(r["test"]["error"])
        ours = [sum(errors[arm]) / len(errors[arm]) for arm in errors if not ARMS[arm].peer]
        norms = errors["gradient norms"]
        assert len(ours) > 3 and sum(norms) / len(norms) < min(ours), data
