"""Test that the report is one self-contained file, shows every finding, and runs no user's script."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bomkern import Box, Calibrated, History, Lower, Payoff, Upper, cli, diagnose
from bomkern.diagnosis.registry import KINDS
from bomkern.report.charts import (
    DARK,
    DASHES,
    LIGHT,
    POINTS,
    Chart,
    colour,
    dash,
    lanes,
    spread,
    thin,
    thin_extremes,
    ticks,
)
from bomkern.report.figures_as_data import csv_of
from bomkern.report.page import write_report
from tests.support.histories import clean, flat, locked, slope, written

EVIL = '<script>alert("1")</script>&'
VOID = {"meta", "img", "br", "wbr"}
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c020000000b4944415478da6364f80f00010501012718e366"
    "0000000049454e44ae426082"
)


class Page(HTMLParser):
    """A parser that checks that a page is well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(tmp_path: Path, history: History, **options: object) -> Page:
    payoff = options.get("payoff")
    write_report(tmp_path / "report.html", history, diagnose(history, payoff=payoff), **options)  # type: ignore[arg-type]
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def rich() -> History:
    """Return a history with several findings, a group, a box, limits and lost steps."""
    raw = {
        "realism": flat(1.5),
        "latent.a": slope(0.4, 1.0, seed=1),
        "latent.b": slope(0.3, 0.8, seed=2),
        "box": flat(0.1, seed=3),
        "upper": flat(0.2, seed=4),
        "lower": flat(3.0, seed=5),
    }
    constraints = {"box": Box(-1.0, 1.0), "upper": Upper(1.0, 0.5), "lower": Lower(1.0, 0.5), "realism": Calibrated(9)}
    raw["realism"][200:210] = torch.nan
    return written(raw, {"realism": 1.0}, {"box": (0.0, 1.0), "lower": (1.0, float("inf"))}, constraints)


def test_every_finding_is_in_it(tmp_path: Path) -> None:
    history = rich()
    found = page(tmp_path, history)
    diagnosis = diagnose(history)
    assert len(diagnosis) >= 3
    for finding in diagnosis:
        for words in (finding.kind, finding.goal, f"{finding.first}\u2013{finding.last}", finding.evidence):
            assert words in found.text
        assert finding.suggestion in found.text and KINDS[finding.kind].meaning in found.text
    for finding in diagnosis.faults:
        assert found.text.count(f"{finding.kind}: {finding.goal}") == 2  # marked on both charts
    for words in (
        *history.layout.columns,
        *map(str, history.layout.constraints),
        "ideal 0",
        "lower -1",
        "upper 1",
        "limit 1",
    ):
        assert words in found.text


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(PIXEL)
    found = page(
        tmp_path,
        rich(),
        pictures={"A picture": tmp_path / "picture.png"},
        config={"lr": 1e-3, "images": ["a", "b"], "data": None},
        payoff={"goals": ["a", "b"], "table": [[1.0, 2.0], [3.0, 4e-7]]},
    )
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    plain = re.sub(r'"data:[^"]*"', '""', text)
    assert "http:" not in plain and "https:" not in plain and "//" not in plain and "url(" not in plain
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in found.tags}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert {a["src"][:22] for a in found.all("img")} == {"data:image/png;base64,"}  # type: ignore[index]
    for words in ("A picture", "images", '["a", "b"]', "trained on", "4e-7"):
        assert words in found.text
    assert found.all("meta")[-1]["content"].startswith("default-src 'none'")  # type: ignore[union-attr]


def test_it_can_be_read_aloud(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(PIXEL)
    found = page(tmp_path, rich(), pictures={"A picture": tmp_path / "picture.png"})
    assert found.all("html")[0]["lang"] == "en" and len(found.all("h1")) == 1
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in found.all("svg"))
    assert all(a.get("alt") for a in found.all("img")) and all(a.get("scope") for a in found.all("th"))
    labels = [a["aria-label"] for a in found.all("svg") if a.get("role") == "img"]
    assert any("realism" in (label or "") and "Water level" in (label or "") for label in labels)


def test_names_are_text(tmp_path: Path) -> None:
    history = written({EVIL: flat(1.5), "b": flat(0.5)}, {EVIL: 1.0})
    found = page(tmp_path, history, config={EVIL: EVIL}, payoff={"goals": [EVIL], "table": [[1.0]]})
    assert found.all("script") == [] and found.text.count(EVIL) > 6
    assert "<script" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("rows", [0, 1, 2, 30, 3000])
def test_any_length(tmp_path: Path, rows: int) -> None:
    history = locked(rows) if rows else History(locked().layout)
    found = page(tmp_path, history)
    assert ("too little to judge" in found.text.lower()) == (rows < 20)
    assert ("Water levels" in found.text) == (rows > 0)
    assert (tmp_path / "report.html").stat().st_size < 120_000


def test_nothing_finite_is_drawn_as_nothing(tmp_path: Path) -> None:
    history = locked(50)
    history._rows[:] = torch.nan
    history._rows[:, history.layout.at.finite] = 0
    assert "not finite" in page(tmp_path, history).text
    assert "nan" not in "".join(a.get("d") or "" for a in page(tmp_path, history).all("path"))


def test_a_run_without_faults_says_so(tmp_path: Path) -> None:
    assert "no bucket has a hole" in page(tmp_path, clean(0)).text.lower()


def test_payoff_of_a_probe(tmp_path: Path) -> None:
    found = page(tmp_path, locked(), payoff=Payoff(["realism", "recon", "kl"], torch.eye(3), 3))
    assert "Payoff table" in found.text and found.text.count("trained on") == 1


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    history = locked()
    diagnosis, path = diagnose(history), tmp_path / "report.html"
    with pytest.raises(TypeError, match="history must be a History"):
        write_report(path, diagnosis, diagnosis)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="diagnosis must be a Diagnosis"):
        write_report(path, history, history)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="payoff: table must have"):
        write_report(path, history, diagnosis, payoff={"goals": ["a"], "table": []})
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"pictures: a\.txt must be one of \.png"):
        write_report(path, history, diagnosis, pictures={"a": tmp_path / "a.txt"})
    with pytest.raises(FileNotFoundError):
        write_report(path, history, diagnosis, pictures={"a": tmp_path / "none.png"})
    assert not path.exists()


def test_the_command_embeds_what_the_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locked().save(tmp_path / "history.pt")
    (tmp_path / "swaps.png").write_bytes(PIXEL)
    (tmp_path / "config.json").write_text(json.dumps({"scales": "auto"}))
    (tmp_path / "payoff.json").write_text(json.dumps({"goals": ["realism"], "table": [[0.4]]}))
    assert cli.main(["diagnose", str(tmp_path)]) == 0
    found = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(found.all("img")) == 1 and "auto" in found.text and "Payoff table" in found.text
    assert "give realism Anchored(0.4, 1)" in found.text and "Anchored(0.4, 1)" in capsys.readouterr().out


# Parts of the report.


def test_colours_stand_out_from_their_page() -> None:
    def light(code: str) -> float:
        parts = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for palette, paper, words in (
        (LIGHT, "#ffffff", ("#1b1f24", "#57606a")),
        (DARK, "#14171a", ("#e8eaed", "#a8b0b9")),
    ):
        for one, least in [*((c, 3.0) for c in palette), *((c, 4.5) for c in words)]:
            bright, dim = sorted((light(one), light(paper)), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= least, one


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.5, 1.0]) and ticks(1, 500, 5) == [100, 200, 300, 400, 500]
    assert ticks(3, 3) == [3]
    assert all(-7e-5 <= x <= 2e-4 for x in ticks(-7e-5, 2e-4))


def test_lanes_do_not_overlap() -> None:
    html = lanes(
        [(1, 400, "1 locked: a", 0), (1, 100, "2 starved: b", 1), (300, 400, "3 starved: reconstruction", 2)], (1, 400)
    )
    assert re.findall(r'class="tag" style="top:(\d+)px;(left|right)', html) == [
        ("0", "left"),
        ("22", "left"),
        ("22", "right"),
    ]


def test_long_curves_are_thinned_and_gaps_stay_gaps() -> None:
    series = torch.linspace(0, 1, 5000).double()
    series[1000:2000] = torch.nan
    low, high = thin_extremes(series)
    assert len(thin(series)) == len(low) == POINTS and low[60] != low[60] and low[0] < high[0]
    chart = Chart("a", (0, 2), (0, 1), 100)
    chart.line([0, 1, 2], [0.0, float("nan"), 1.0], "red")
    assert 'd="M0 1000M1000 0"' in chart.html()


def test_words_at_one_height_share_a_line_and_labels_stay_inside() -> None:
    chart = Chart("a", (0, 1000), (0, 1e5), 110, "raw")
    chart.note(0.0, "ideal"), chart.note(1.0, "nadir"), chart.note(9e4, "limit")
    html = chart.html([500, 1000], [0], x_name="step")
    assert re.findall(r'class="note"[^>]*>([^<]*)', html) == ["ideal, nadir", "limit"]
    assert re.findall(r'class="x" style="([^"]*)">([^<]*)', html) == [
        ("left:50.00%", "step 500"),
        ("right:0;transform:none", "1000"),
    ]
    assert 'class="y-name">raw<' in html


def test_goals_beyond_the_palette_differ_in_their_dashes() -> None:
    assert len(DARK) == len(LIGHT) and len(set(LIGHT)) == len(LIGHT) and len(set(DASHES)) == len(DASHES)
    looks = [(colour(g), dash(g)) for g in range(64)]
    assert len(set(looks)) == len(looks)
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in pairwise(looks[: len(LIGHT)]))
    assert all(a[0] != b[0] for a, b in pairwise(looks))


@pytest.mark.parametrize("count", [12, 64])
def test_any_number_of_goals_is_drawn(tmp_path: Path, count: int) -> None:
    names = [f"goal{i}" for i in range(count)]
    found = page(tmp_path, written({n: flat(0.5, 40, i) for i, n in enumerate(names)}, dict.fromkeys(names, 1 / count)))
    swatches = {(a["stroke"], a["stroke-dasharray"]) for a in found.all("line") if "stroke-dasharray" in a}
    lines = {(a["stroke"], a["stroke-dasharray"]) for a in found.all("path") if a.get("stroke-width") == "2"}
    assert len(swatches) == count and swatches <= lines and all(name in found.text for name in names)


def test_axes_are_named_and_what_is_idle_is_counted_apart(tmp_path: Path) -> None:
    found = page(tmp_path, written({"a": flat(1.5), "b": slope(1.0, 0.6), "c": flat(0.02)}, {"a": 0.95, "b": 0.05}))
    assert "1 finding, and 1 for information." in found.text
    assert all(words in found.text for words in ("mean score", "share", "step 200"))


def test_lost_rows_at_the_end_are_no_numbers(tmp_path: Path) -> None:
    history = locked()
    history._rows[-40:] = torch.nan
    history._rows[-40:, history.layout.at.finite] = 0
    found = page(tmp_path, history)
    labels = [a.get("aria-label") or "" for a in found.all("svg")]
    assert any("at the end" in label.lower() for label in labels) and not any("nan" in label for label in labels)
    assert "ideal 0" in found.text and not re.search(r"\bnan\b", found.text)


def test_every_section_is_in_the_contents(tmp_path: Path) -> None:
    seen = page(tmp_path, locked(), config={"steps": 1})
    links = [link["href"] for link in seen.all("a") if str(link["href"]).startswith("#")]
    assert links == [f"#{section['id']}" for section in seen.all("section")] and len(links) >= 6


def test_the_numbers_of_a_chart_can_be_saved(tmp_path: Path) -> None:
    history = locked()
    seen = page(tmp_path, history)
    links = [link for link in seen.all("a") if "download" in link]
    files = {a["download"]: base64.b64decode(str(a["href"]).partition(",")[2]).decode() for a in links}
    assert set(files) == {"levels.csv", "shares.csv", "raw_values.csv"}
    assert all(text in seen.text for text in files.values())  # shown on the page, too
    for name, field in (("levels.csv", "level"), ("shares.csv", "share")):
        head, *lines = csv.reader(io.StringIO(files[name]))
        assert head == ["step", *history.layout.goals]
        means = torch.tensor([[float(x) for x in line[1:]] for line in lines]).mean(0)
        torch.testing.assert_close(means, history[field].float().mean(0), atol=0.01, rtol=0.01)
    head, *lines = csv.reader(io.StringIO(files["raw_values.csv"]))
    assert len(head) == 1 + 3 * len(history.layout.columns) and len(lines) <= POINTS
    middle, least, largest = ([float(line[k]) for line in lines] for k in (1, 2, 3))
    assert all(a <= b + 1e-4 <= c + 2e-4 for a, b, c in zip(least, middle, largest, strict=True))


def test_csv_keeps_names_and_leaves_out_what_is_missing() -> None:
    text = csv_of({"step": [1.0, 2.0], 'a, "b"': [float("nan"), 0.123456789]})
    assert list(csv.reader(io.StringIO(text))) == [["step", 'a, "b"'], ["1", ""], ["2", "0.12346"]]


def test_labels_beside_a_chart_do_not_overlap() -> None:
    for places in ([0.0, 1, 2, 3], [97.0, 98, 99, 100], [10.0, 50, 90], [50.0] * 6):
        moved = spread(places, 14, 100)
        assert all(b - a >= 14 - 1e-9 for a, b in pairwise(moved)) and moved[0] >= -1e-9 and moved[-1] <= 100
    assert spread([10.0, 50, 90], 14, 100) == [10, 50, 90]
    chart = Chart("", (0, 1), (0, 1), 100)
    for index, name in enumerate(("near", EVIL)):
        chart.end(0.5, name, index)
    chart.end(float("nan"), "lost", 2)
    html = chart.html()
    assert html.count('class="end"') == 2 and "lost" not in html and "<script" not in html and "labelled" in html
    assert "labelled" not in Chart("", (0, 1), (0, 1), 100).html()


@pytest.mark.parametrize(("count", "fits"), [(8, True), (9, False), (64, False)])
def test_labels_that_do_not_fit_beside_a_chart_are_left_to_the_list_of_goals(count: int, fits: bool) -> None:
    chart = Chart("", (0, 1), (0, 1), 100)
    for index in range(count):
        chart.end(index / count, str(index), index)
    html = chart.html()
    tops = [int(top) for top in re.findall(r'class="end" style="top:(\d+)px', html)]
    assert len(tops) == (count if fits else 0) and ("labelled" in html) == fits
    assert all(0 <= top <= 100 for top in tops)
