"""Test the names, links and markers of docs/ without mkdocs; `make docs` builds the pages."""

from __future__ import annotations

import importlib.util
import inspect
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bomkern
from bomkern.dispatch import schemas

DOCS = Path(__file__).parents[2] / "docs"
ROOT = DOCS.parent
RESULTS = DOCS.parent / "bench" / "results"
PAGES = sorted(DOCS.rglob("*.md"))
OPS = sorted((DOCS / "ops").glob("*.md"))


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = _load("hooks")


def by_name(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, id=str(path.relative_to(DOCS))) for path in paths]


def test_every_public_name_is_on_the_api_page() -> None:
    told = set(re.findall(r"\[`(\w+)`\]", (DOCS / "api.md").read_text()))
    assert told == {*bomkern.__all__, "anchors", "nn"}


def test_every_public_name_is_documented_once() -> None:
    shown = [name for page in PAGES for name in re.findall(r"^::: bomkern\.(\S+)$", page.read_text(), re.MULTILINE)]
    assert sorted(shown) == sorted([*bomkern.__all__, "anchors", "nn"])


def test_every_module_is_on_its_page() -> None:
    members = re.search(r"members: \[(.*)\]", (DOCS / "modules.md").read_text())
    assert members
    assert sorted([*members[1].split(", "), "GoalSet"]) == sorted(bomkern.nn.__all__)


@pytest.mark.parametrize("page", by_name(OPS))
def test_every_op_has_its_figures(page: Path) -> None:
    text = page.read_text()
    cases = re.findall(r"^<!-- bench (\S+)", text, re.MULTILINE)
    assert set(cases) == {page.stem.removesuffix("_loss")}
    assert hooks.expand(text).count("\n|---|") > len(cases)


def test_every_op_has_a_page_in_the_navigation() -> None:
    assert "ops/" not in (ROOT / "mkdocs.yml").read_text(), "docs/hooks.py fills the navigation's ops"
    navigation = [page for entry in hooks.ops_navigation() for page in entry.values()]
    assert sorted(navigation) == sorted(op.page for op in schemas.OPS.values())


def test_every_case_is_on_a_page() -> None:
    shown = [case for page in PAGES for case in re.findall(r"^<!-- bench (.+) -->$", page.read_text(), re.MULTILINE)]
    assert sorted(shown) == sorted(hooks.report.CASES)


@pytest.mark.parametrize("page", by_name(PAGES))
def test_markers_are_replaced(page: Path) -> None:
    assert "<!--" not in hooks.expand(page.read_text())


def broken_links(markdown: str, place: str) -> list[str]:
    """Return the links of a page that lead nowhere in the site, without those in its blocks of code."""
    known = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*")} | set(hooks.OUTSIDE)
    known |= {f"results/{path.name}" for path in RESULTS.iterdir()}
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not link.startswith("https://")]
    return [link for link in links if posixpath.normpath(posixpath.join(posixpath.dirname(place), link)) not in known]


@pytest.mark.parametrize("page", by_name(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    """Links in what markers insert count, too."""
    place = str(page.relative_to(DOCS))
    assert broken_links(hooks.expand(page.read_text(), place), place) == []
    assert "://" not in re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("place", hooks.OUTSIDE)
def test_links_of_a_page_from_elsewhere_lead_somewhere(place: str) -> None:
    source = hooks.OUTSIDE[place]
    assert broken_links(hooks.relinked((ROOT / source).read_text(), source, place), place) == []


@pytest.mark.parametrize(
    ("source", "page", "told", "meant"),
    [
        ("CONTRIBUTING.md", "contributing.md", "[a](docs/start.md#x)", "[a](start.md#x)"),
        ("CONTRIBUTING.md", "contributing.md", "[a](tests/README.md)", "[a](results/tests.md)"),
        ("bench/results/policies.md", "problems/vicreg.md", "![a](front.png)", "![a](../results/front.png)"),
        ("tests/README.md", "results/tests.md", "[a](../bench/results/sass.md)", "[a](sass.md)"),
        ("README.md", "index.md", "[a](https://example.org) [b](#here)", "[a](https://example.org) [b](#here)"),
    ],
)
def test_links_start_where_the_text_goes(source: str, page: str, told: str, meant: str) -> None:
    assert hooks.relinked(told, source, page) == meant


def test_intervals_in_tables_stay_on_one_line() -> None:
    told = "18.1 (17.9, 18.3) dB\n| a | +0.2 (-0.1, +0.5) | `Anchored(0.0, 1.0)` |"
    assert hooks.unbroken(told) == told.replace("(-0.1, +0.5)", "(-0.1,\u00a0+0.5)")


def test_a_link_that_leads_nowhere_is_found() -> None:
    assert broken_links("[a](start.md) [b](nowhere.md)\n```\n[c](none.md)\n```\n", "index.md") == ["nowhere.md"]
    assert broken_links("![a](front.png) [b](../start.md)", "problems/vicreg.md") == ["front.png"]


@pytest.mark.parametrize(
    ("marker", "why"),
    [
        ("bench nothing", "no case 'nothing'"),
        ("report nothing", "no part 'nothing'"),
        ("from nothing.md: Heading", r"nothing\.md is not there"),
        ("from route.md: Nothing", "no section 'Nothing'"),
        ("readme python -m nothing", "no part that 'python -m nothing' writes"),
        ("example nothing.py", r"examples/nothing\.py is not there"),
        ("code bench/nothing.py: Nothing", r"bench/nothing\.py is not there"),
        ("code bench/cases.py: Nothing", "no class or function 'Nothing'"),
        ("printed nothing", r"docs/pictures/nothing\.txt is not there"),
    ],
)
def test_what_is_not_there_is_refused(marker: str, why: str) -> None:
    with pytest.raises(hooks.Missing, match=why):
        hooks.expand(f"# Page\n\n<!-- {marker} -->\n")


def test_a_problem_that_was_not_measured_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hooks, "HERE", tmp_path)
    told = "5 seeds, see [a](budget.md).\n\n![all problems](front.png)\n"
    (tmp_path / "policies.md").write_text(f"# Study\n\n## Digits\n\n{told}\n## The rules\n")
    shown = hooks.expand("<!-- study digits: Digits -->", "problems/digits_vae.md")
    assert shown == "### Digits\n\n5 seeds, see [a](../results/budget.md)."
    told = hooks.expand("<!-- study tasks13: 13 tasks -->")
    assert told == "*13 tasks.* Not measured yet: `python -m bench.policies --data tasks13`."


def test_the_rooms_are_those_that_are_checked() -> None:
    (page,) = [page for page in PAGES if "<!-- rooms -->" in page.read_text()]
    rows = re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \| (.+\.) \|", hooks.expand(page.read_text()), re.MULTILINE)
    assert {room: int(floor) for floor, room, _ in rows} == hooks.rooms.FLOOR


def test_the_nine_goals_are_those_of_the_trainer() -> None:
    nine_goals = pytest.importorskip("bomkern.train.nine_goals")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", hooks.expand("<!-- nine goals -->"), re.MULTILINE)
    assert tuple(name for name, _ in rows) == nine_goals.GOALS
    assert all("Ideal" in words and "adir" in words for _, words in rows)


def pages_of(navigation: Any) -> list[str]:
    """Return the pages of a part of mkdocs.yml's navigation."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in pages_of(part)]


def test_no_page_is_an_orphan() -> None:
    """Every page is in the navigation, and another page links to it."""
    yaml = pytest.importorskip("yaml")
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:\n")[2].partition("\nvalidation:")[0]
    listed = pages_of(yaml.safe_load(navigation)) + pages_of(hooks.ops_navigation())
    own = {str(page.relative_to(DOCS)) for page in PAGES}
    assert own <= set(listed) and len(listed) == len(set(listed))
    linked = set()
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+\.md)", page.read_text()):
            if (path := (page.parent / target).resolve()) != page:
                linked.add(str(path.relative_to(DOCS)) if path.is_relative_to(DOCS) else "")
    assert own - linked == {"index.md"}


def test_the_site_asks_nothing_of_a_network() -> None:
    """Search works from the disk by the offline plugin, with our helper in place of one that it would fetch."""
    settings = (ROOT / "mkdocs.yml").read_text()
    (helper,) = re.findall(r"polyfills: \[(.*?)\]", settings)
    assert "iframe-worker" in helper and (DOCS / helper).is_file() and "  - offline" in settings
    assert "font: false" in settings and "https://" not in settings


def test_a_case_without_results_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "committed", list)
    for marker in ("bench gaussian_kl", "report whole step"):
        with pytest.raises(hooks.Missing, match="make bench"):
            hooks.expand(f"<!-- {marker} -->")


def test_the_first_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    assert code
    exec(code[1], {})
    assert "recon" in capsys.readouterr().out


def test_every_example_is_on_its_page() -> None:
    pages = "".join((DOCS / name).read_text() for name in ("examples.md", "water_filling.md"))
    shown = re.findall(r"^<!-- example (\S+) -->$", pages, re.MULTILINE)
    assert sorted(shown) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_the_page_of_examples_says_which_rule_does_best() -> None:
    page = " ".join((DOCS / "examples.md").read_text().split())
    last = {f"{path.stem}.py": path.read_text().splitlines()[-1] for path in (DOCS / "pictures").glob("*.txt")}
    for told, rule in (
        ("the bottleneck rule does best in", "bottleneck rule"),
        ("Equal weights of the deficits do best in", "equal weights of deficits"),
    ):
        named = page.partition(f"{told} ")[2].partition(". ")[0].split(", ")
        assert sorted(named) == sorted(name for name, line in last.items() if rule in line)


def test_a_star_import_brings_the_documented_names_and_no_module() -> None:
    """In the user's code ``nn`` stays torch's, whatever was imported before."""
    for module in ("nn", "integrations", "report"):
        importlib.import_module(f"bomkern.{module}")
    names: dict[str, Any] = {"nn": torch.nn}
    exec("from bomkern import *", names)
    assert names.pop("nn") is torch.nn
    brought = names.keys() - {"__builtins__"}
    assert brought == set(re.findall(r"\[`(\w+)`\]\[bomkern\.", (DOCS / "api.md").read_text()))
    assert not [name for name in brought if inspect.ismodule(names[name])]


def test_warnings_fail_the_build() -> None:
    """mkdocs counts no warning under --quiet, so that --strict would let all of them pass."""
    (command,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "mkdocs build" in line]
    assert "--strict" in command and "-q" not in command


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    for needed in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(needed)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "index.html").is_file() and "WARNING -" not in run.stderr
