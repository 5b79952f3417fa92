"""Run the code of docs/recipes and of docs/anchors.md, page by page."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

from tests.support.pages import code_of, torchrun

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
PAGES = sorted(path for path in RECIPES.glob("*.md") if path.name != "index.md")
RUN = [*PAGES, RECIPES.parent / "anchors.md"]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun(monkeypatch)
    # Without Inductor, which would need most of a minute to compile.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    try:
        with torch.random.fork_rng():
            exec(compile(code_of(page), str(page), "exec"), {"__name__": "recipe"})
    finally:
        torch._dynamo.reset()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short_and_complete(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) < 60
    assert text.startswith("# How do I ") and text.splitlines()[0].endswith("?")
    assert text.count("\n```python\n") >= 1 and "assert " in code_of(page)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Why", "What not to do"]


def test_the_index_names_every_page() -> None:
    assert sorted(re.findall(r"\]\((\w+)\.md\)", (RECIPES / "index.md").read_text())) == [page.stem for page in PAGES]
