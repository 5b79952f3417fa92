"""Test the benchmark report: kept results, fits, comparisons, pages, pictures and the table in the README."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import compare, kernels
from bench import readme as readme_parts
from bench.report import figures, growth, page, tables, write
from bench.results import HERE, Results, committed, read
from tests.support.bench_results import MACHINE, made, results, row

GPU = {**MACHINE, "device": "cuda", "name": "NVIDIA H200", "cuda": "13.0", "driver": "580.1"}


def test_what_is_kept_says_the_same(tmp_path: Path) -> None:
    first = read([made(tmp_path / "run.json", results())])
    first.save(tmp_path / "kept.json")
    again = read([tmp_path / "kept.json"])
    assert again.rows == first.rows and again.machine == MACHINE
    for kept, had in zip(first.rows, results().rows, strict=True):
        assert kept == {**had, "seconds": pytest.approx(had["seconds"], rel=1e-3)}
    assert again.stem == "cpu" and read([made(tmp_path / "gpu.json", results(), GPU)]).stem == "NVIDIA-H200"


def test_runs_of_one_machine_are_joined_and_of_two_refused(tmp_path: Path) -> None:
    faster = {**MACHINE, "ceilings": {"bytes": 3e10, "exponentials": None, "flops": 1e11}}
    both = read([made(tmp_path / "a.json", results()), made(tmp_path / "b.json", results(), faster)])
    assert len(both.rows) == 2 * len(results().rows)
    assert both.machine["ceilings"] == {"bytes": 3e10, "exponentials": 1e10, "flops": 4e11}
    with pytest.raises(ValueError, match="different machines"):
        read([made(tmp_path / "a.json", results()), made(tmp_path / "c.json", results(), GPU)])
    (tmp_path / "d.json").write_text('{"benchmarks": [{"extra_info": {}}]}')
    with pytest.raises(ValueError, match=r"d\.json is not a file of pytest bench/"):
        read([tmp_path / "d.json"])


def test_exponents_of_known_growth() -> None:
    rows = [
        {**row("total_correlation", "eager", 2e-9 * b**2 * 32, B=b, D=32), "peak_bytes": 1.9e3 * b}
        for b in (128, 512, 1024, 2048)
    ]
    rows += [row("total_correlation", "eager", 2e-9 * 512**2 * d, B=512, D=d) for d in (16, 64)]
    found = {(line.letter, line.fixed): line for line in growth.exponents(Results(MACHINE, "", "", rows))}
    in_b = found["B", "D = 32"]
    assert in_b.time == pytest.approx((2, 0), abs=1e-9) and in_b.over == "128 to 2,048"
    assert in_b.memory is None  # two of its four tensors are a megabyte or more
    assert found["D", "B = 512"].time == pytest.approx((1, 0), abs=1e-9)
    assert growth.fit([(1, 1), (2, 2)]) is None
    noisy = growth.fit([(1, 1), (2, 5), (4, 3)])
    assert noisy is not None and noisy[1] > 0.1


def test_a_ratio_that_fell_is_found() -> None:
    lines, fine = compare.compare(results(), [results(bomkern=1.1e-6)])
    assert fine and not any("FELL" in line for line in lines)
    lines, fine = compare.compare(results(), [results(bomkern=1.2e-6)])
    assert not fine and sum("FELL" in line for line in lines) == 3 * len(page.CASES)
    # A slower machine does not count as a slower bomkern. The best of several runs counts.
    assert compare.compare(results(), [results(bomkern=5e-6, eager=45e-6)])[1]
    assert compare.compare(results(), [results(bomkern=1.2e-6), results()])[1]
    other = {**MACHINE, "simd": "avx512"}
    assert compare.compare(results(), [results(other, bomkern=1.5e-6)])[1]
    assert not compare.compare(results(), [results(other, bomkern=2.5e-6)])[1]
    assert not compare.compare(results(), [Results(MACHINE, "", "", [])])[1]


def test_pairs_count_as_they_were_paired() -> None:
    paired = {**row("gaussian_kl", "bomkern", 1.0, "forward+backward in pairs", B=64, D=2), "pair": 7.5}
    assert list(compare.ratios(Results(MACHINE, "", "", [paired])).values()) == [7.5]


def runs(*pairs: float) -> Results:
    one = row("gaussian_kl", "bomkern", 1.0, "forward+backward in pairs", B=64, D=2)
    return Results(MACHINE, "", "", [{**one, "pair": pair} for pair in pairs])


def test_a_base_of_several_runs_allows_their_spread() -> None:
    assert list(compare.ratios(runs(4.0, 5.0)).values()) == [4.0]
    assert not compare.compare(runs(4.0), [runs(3.3)])[1]
    assert compare.compare(runs(4.0, 5.0), [runs(2.8)])[1]  # 4 times 0.85 times 4 / 5 is 2.72
    lines, fine = compare.compare(runs(4.0, 5.0), [runs(2.7)])
    assert not fine and "FELL by more than 32%" in lines[1]
    assert compare.compare(runs(4.0), [runs(3.0), runs(3.5)])[1]


def test_recorded_runs_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = iter([5.0, 4.0, 4.5])
    monkeypatch.setattr(compare, "run", lambda to: runs(next(pairs)).save(to))
    assert compare.main([str(tmp_path / "guard.json"), "--record", "3"]) == 0
    again = read([tmp_path / "guard.json"])
    assert [row["pair"] for row in again.rows] == [5.0, 4.0, 4.5] and "--record 3" in again.command
    assert committed(tmp_path) == []  # not a machine's report


def test_compare_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, new = (made(tmp_path / f"{n}.json", results(bomkern=t)) for n, t in (("base", 1e-6), ("new", 2e-6)))
    assert compare.main([str(base), str(base)]) == 0
    assert compare.main([str(base), str(new)]) == 1 and "FELL by more than 15%" in capsys.readouterr().out
    assert compare.main([str(base), str(tmp_path / "missing.json")]) == 2
    with pytest.raises(SystemExit):
        compare.main([str(base)])


def test_compare_runs_again_only_where_one_fell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = made(tmp_path / "base.json", results())
    times = iter([2e-6, 1e-6, 9.0])
    monkeypatch.setattr(compare, "run", lambda to: results(bomkern=next(times)))
    assert compare.main([str(base), "--run", "3"]) == 0 and next(times) == 9.0
    monkeypatch.setattr(compare, "run", lambda to: results(bomkern=2e-6))
    assert compare.main([str(base), "--run", "2"]) == 1


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 8))])
def test_what_a_run_that_was_cut_short_left_makes_a_page(tmp_path: Path, seed: int) -> None:
    """A run that was cut short makes a page, with any number of a GPU's benches and any ceilings."""
    chance = random.Random(seed)
    whole = results(GPU)
    whole.rows.append({**row("total_correlation", "bomkern", 1.0, "peak memory", B=64, D=128)})
    whole.rows.append(row("host time of min_goal_loss", "torch.exp", 1e-6, "forward", B=64))
    for count in (0, 1, 2, 5, 40, len(whole.rows) - 1):
        rows = chance.sample(whole.rows, count)
        ceilings = {unit: chance.choice([None, 1e9]) for unit in MACHINE["ceilings"]}
        found = Results({**GPU, "ceilings": ceilings}, whole.date, whole.command, rows, tmp_path)
        assert page.page([found], tmp_path).startswith("# What the benches measured")
        write.readme_table(found)
    figures.draw(found, tmp_path)


def test_another_folder_leaves_the_kept_results_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def kept() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (write.README, *HERE.rglob("*")) if path.is_file()}

    before, folder, run = kept(), tmp_path / "not" / "there", made(tmp_path / "run.json", results(GPU), GPU)
    assert write.main([str(run), "--results", str(folder)]) == 0 and kept() == before
    names = {path.name for path in folder.iterdir()}
    assert names >= {"NVIDIA-H200.json", "README.md", "NVIDIA-H200_time.png"}
    text = (folder / "README.md").read_text()
    assert "# NVIDIA H200" in text and "Xeon" not in text and "policies.md" not in text
    launch = {"kernel": "min_goal_forward", "us": 9.5, "sm": 20.0, "dram": 81.0, "occupancy": 60.0}
    (folder / "NVIDIA-H200_kernels.json").write_text(json.dumps([launch]))
    assert write.main(["--check", "--results", str(folder)]) == 1  # the page does not show the profile
    assert write.main(["--results", str(folder)]) == 0 and "min_goal_forward" in (folder / "README.md").read_text()
    assert write.main(["--check", "--results", str(folder)]) == 0 and kept() == before


def test_without_matplotlib_there_are_pages_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "bench.report.figures")
    monkeypatch.delattr("bench.report.figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write.main([str(made(tmp_path / "run.json", results())), "--results", str(tmp_path)]) == 0
    assert "no pictures: matplotlib is not installed" in capsys.readouterr().err
    assert (tmp_path / "README.md").exists() and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("machine", [MACHINE, GPU], ids=["cpu", "gpu"])
def test_the_page_and_its_pictures(tmp_path: Path, machine: dict[str, Any]) -> None:
    found = results(machine)
    if machine is GPU:
        found.folder = tmp_path
        launch = {"kernel": "min_goal_forward", "us": 9.5, "sm": 20.0, "dram": 81.0, "occupancy": 60.0}
        (tmp_path / "NVIDIA-H200_kernels.json").write_text(json.dumps([launch]))
        for one in found.rows:
            one |= {"host_us": 10.0, "event_us": 11.0, "graph_us": None}
    text = page.page([found])
    figures.draw(found, tmp_path)
    pictures = re.findall(r"\]\((\w[\w-]*\.png)\)", text)
    assert len(pictures) == 4 and all((tmp_path / name).stat().st_size > 10_000 for name in pictures)
    assert "| bomkern | 64 us | 512 us | 65.5 ms |" in text and "| eager | 9.0x | 9.0x | 9.0x |" in text
    assert ("Not measured on a GPU yet" in text) == (machine is MACHINE)
    assert ("| `min_goal_forward` | 9.5 | 20.0 | 81.0 | 60.0 |" in text) == (machine is GPU)
    assert max(len(line) for line in text.splitlines() if not line.startswith(("|", "!"))) <= tables.WIDTH


def test_a_profile_becomes_a_table(tmp_path: Path) -> None:
    head = '"ID","Process Name","Host Name","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    name = "void bomkern::tc::forward<(int)4, float>(bomkern::Args)"
    metrics = zip(kernels.METRICS, ("ns", "%", "%", "%"), ("12,500", "81.25", "3.5", "60"), strict=True)
    lines = [f'"0","python","box","{name}","{metric}","{unit}","{value}"' for metric, unit, value in metrics]
    lines.append(lines[1].replace("81.25", "n/a").replace('"0"', '"1"'))  # a counter that this GPU does not have
    (tmp_path / "ncu.csv").write_text("\n".join(["==PROF== Connected", head, *lines, "==PROF== Disconnected"]))
    found, less = kernels.read(tmp_path / "ncu.csv")
    assert less == {"kernel": "bomkern::tc::forward"}
    assert found == {"kernel": "bomkern::tc::forward", "us": 12.5, "sm": 81.25, "dram": 3.5, "occupancy": 60.0}


@pytest.mark.parametrize(
    "seconds, written", [(2.5e-6, "2.5 us"), (9.994e-4, "999 us"), (0.0123, "12.3 ms"), (3.0, "3 s")]
)
def test_times_are_written_in_their_unit(seconds: float, written: str) -> None:
    assert tables.time(seconds) == written


def test_the_pages_show_what_is_kept() -> None:
    """The README's table and bench/results/README.md match the committed results."""
    assert committed(), "no results are kept in bench/results"
    for path, text in write.pages().items():
        assert path.read_text() == text, f"{path} says something else: run python -m bench.report"


def test_a_changed_figure_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    text = write.README.read_text()
    begin = text.index(readme_parts.begin(write.COMMAND))
    changed = text[:begin] + re.sub(r"(\d)x \|", "9\\1x |", text[begin:], count=1)
    assert changed != text
    readme.write_text(changed)
    monkeypatch.setattr(write, "README", readme)
    assert write.main(["--check"]) == 1
    readme.write_text(text)
    assert write.main(["--check"]) == 0
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="has no"):
        write.main(["--check"])


def test_nothing_kept_names_a_machine_or_a_path() -> None:
    for path in [*HERE.glob("*.json"), *HERE.glob("*.log")]:
        assert not re.search(r"/(home|work|root|tmp|opt)/|hostname|\"node\"", path.read_text()), path


def test_a_compiled_step_is_told_beside_the_eager_one() -> None:
    assert "the default step is 1.6x as fast as it is eager; its first call, which compiles, took 1 s." in " ".join(
        page.page([results()]).split()
    )
    assert "| the trainer's default with `--compile`, B = 64 | 125 ms |  | 2.4x |" in write.readme_table(results())
