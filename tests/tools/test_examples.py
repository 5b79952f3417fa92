"""Run a short form of the examples that draw a picture, and look at it."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 20
# What each example compares, and the line that says which rule does best.
LAST = {
    "gan": ("Frechet distance", "best PSNR: "),
    "many_tasks": ("held-out deficits", "lowest worst deficit: "),
    "pinn": ("relative L2 error", "nearest to the exact solution: "),
    "vicreg": ("held-out accuracy", "most accurate: "),
    "water_filling": ("== automatic scales: held-out PSNR", "== anchored, spill: held-out PSNR"),
}


@pytest.fixture
def figures() -> Iterator[None]:
    """Draw without a display, and close the figures."""
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")


@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize("name", LAST)
def test_an_example_runs_and_draws(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", [name, "--steps", str(STEPS), "--picture", str(picture)])
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for words in (f"{STEPS} steps", f"steps 1 to {STEPS}: the gradient went to ", *LAST[name]):
        assert words in printed
    assert "nan" not in printed
    pixels = matplotlib.image.imread(picture)[..., :3]
    coloured = (pixels.max(2) - pixels.min(2) > 0.3).mean()  # axes and words are black, and the rest is white
    assert coloured > 0.001
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 100
    assert f"examples/{path.name}" in text.split('"""')[1]
