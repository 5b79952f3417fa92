"""Test the registry of findings: its readers, and the parts that a new kind needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bomkern import Finding, cli, diagnose
from bomkern.diagnosis.finding import make
from bomkern.diagnosis.registry import DETECTORS, KINDS, Kind, detects, is_information
from bomkern.diagnosis.run_view import RunView
from tests.support.histories import T, flat, locked, slope, written

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def registry() -> Iterator[None]:
    """Remove the kinds and detectors that a test has added."""
    kinds, detectors = KINDS.copy(), DETECTORS.copy()
    yield
    KINDS.clear(), DETECTORS.clear()
    KINDS.update(kinds), DETECTORS.extend(detectors)


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks_for_findings", DOCS / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_docs_list_every_kind() -> None:
    page = (DOCS / "moving_targets.md").read_text()
    assert page.count("<!-- findings -->") == 1
    shown, rows = hooks().expand(page), hooks().findings()
    order = [shown.index(f"| {kind.name} | {kind.meaning} | {kind.explanation} |") for kind in KINDS.values()]
    weights = [kind.weight for _, kind in sorted(zip(order, KINDS.values(), strict=True), key=lambda pair: pair[0])]
    assert weights == sorted(weights, reverse=True) and len(rows) == len(KINDS) + 3


def test_docs_without_kinds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = hooks()
    monkeypatch.setattr(module, "DIAGNOSIS", tmp_path)
    with pytest.raises(module.Missing, match="no kind of finding"):
        module.expand("<!-- findings -->")


def test_kinds_are_complete() -> None:
    for name, kind in KINDS.items():
        assert name == kind.name and 0 < kind.weight <= 1 and kind.meaning and kind.explanation.endswith(".")
        assert set(kind.explains) <= KINDS.keys()
    assert [is_information(name) for name in ("idle", "locked", "unheard of")] == [True, False, False]


@pytest.mark.usefixtures("registry")
def test_a_new_finding_is_known_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = Kind("strange", 1.0, "as never seen", "Something is strange.", explains=("locked",))
    calm = Kind("calm", 0.01, "all is well", "Nothing happens.", information=True)

    @detects(strange, each="goal")
    def first_is_strange(run: RunView, g: int) -> Iterator[Finding]:
        if g == 0:
            yield make(run, strange, (g,), (0, run.rows), 1.0, f"{run.goals[g]} is strange", "look at it")

    @detects(calm, each="run")
    def everyone_is_calm(run: RunView) -> Iterator[Finding]:
        for g in range(len(run.goals)):
            yield make(run, calm, (g,), (0, run.rows), 0.1, "it is calm", "none needed")

    history = locked()
    found = diagnose(history)
    assert [(f.kind, f.goals) for f in found if f.kind in ("strange", "locked")] == [("strange", ("realism",))]
    # realism has a fault, so it is not calm
    assert [f.goals for f in found if f.kind == "calm"] == [("recon",), ("kl",)]
    assert "calm" not in [f.kind for f in found.faults] and found[0].kind == "strange"

    history.save(tmp_path / "history.pt")
    assert cli.main(["diagnose", str(tmp_path)]) == 0 and "realism is strange" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "as never seen" in page and "all is well" in page and page.count("strange: realism") == 2
    assert "calm: recon" not in page  # the charts mark no finding of information level


@pytest.mark.usefixtures("registry")
def test_pairs_are_looked_at_once() -> None:
    kind, seen = Kind("pair", 1.0, "two", "Two goals."), []

    @detects(kind, each="pair")
    def pair(run: RunView, i: int, j: int) -> Iterator[Finding]:
        seen.append((i, j))
        yield from ()

    diagnose(written({"a": flat(1.0), "b": slope(1.0, 0.5), "c": flat(0.1, T, 1)}, {"a": 1.0}))
    assert seen == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.usefixtures("registry")
def test_a_name_belongs_to_one_kind() -> None:
    with pytest.raises(ValueError, match="two kinds of findings are called 'locked'"):
        detects(Kind("locked", 0.5, "another", "Another."), each="goal")
