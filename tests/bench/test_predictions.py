"""Test the GPU predictions: the file, its floors, and how the report shows the misses."""

from __future__ import annotations

import json
import re

import pytest

from bench import harness, machine, predictions
from bench.harness import BACKWARD, BOTH, FORWARD
from bench.ops import bench_min_goal
from bench.report import page
from bench.report.tables import WIDTH
from bench.results import PREDICTIONS, Results
from bomkern.dispatch import select

TOLD = json.loads(PREDICTIONS.read_text())
MACHINE = {
    "device": "cuda", "name": "NVIDIA H200", "threads": 16, "simd": "avx512", "bomkern": "0.1.0", "torch": "2.11.0",
    "python": "3.12", "system": "Linux", "cuda": "13.0", "driver": "580.1",
    "ceilings": {"bytes": 4e12, "exponentials": 3e12, "flops": 5e13},
}  # fmt: skip


def test_the_file_is_what_the_module_gives(capsys: pytest.CaptureFixture[str]) -> None:
    assert predictions.main(["--check"]) == 0, "run python -m bench.predictions"


def test_a_change_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "LAUNCH", 3.0)
    assert predictions.main(["--check"]) == 1


def test_they_say_that_they_are_predictions() -> None:
    assert TOLD["kind"] == "predictions" and "Nothing here was measured" in TOLD["what"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", TOLD["made"])
    assert "seconds" not in PREDICTIONS.read_text() and "measured_us" not in PREDICTIONS.read_text()


def test_every_case_of_the_report_has_one() -> None:
    assert {entry["case"] for entry in TOLD["entries"]} >= set(page.CASES)


def test_no_prediction_is_below_its_floor() -> None:
    for entry in TOLD["entries"]:
        assert entry["because"] and entry["predicted_us"] >= 0.95 * entry["floor_us"], entry


def test_both_directions_are_the_sum_of_each() -> None:
    found = {(e["case"], tuple(e["size"].items()), e["direction"]): e for e in TOLD["entries"]}
    for (case, size, direction), entry in found.items():
        if direction == BOTH:
            parts = [found[case, size, one] for one in (FORWARD, BACKWARD)]
            assert entry["launches"] == sum(part["launches"] for part in parts)
            assert entry["predicted_us"] == pytest.approx(sum(part["predicted_us"] for part in parts), rel=0.01)


@pytest.mark.skipif(machine.DEVICE != "cpu", reason="operators are counted on a CPU")
@pytest.mark.parametrize("plan", predictions.PLANS, ids=lambda plan: plan.case.name)
def test_the_launches_of_a_loss_are_counted(plan: predictions.Plan) -> None:
    """Each operator of the loss counts as one launch where our two ops are compiled."""
    if select.why_not(plan.case.op, "cpu", "cpu"):
        pytest.skip("not compiled here")
    size = tuple({**plan.sizes[0], "B": 32}.items())
    step = harness.once(plan.case, plan.case.ours, harness.inputs(plan.case, size), backward=True)
    step()  # the first call makes the tables
    stack = plan.case.op == "goal_set"  # the forward pass stacks, too
    assert machine.counted(step)["launches"] == 2 + stack + plan.loss


def test_floors_by_hand() -> None:
    """A million samples of nine goals are 37.7 MB, or 9.2 us at 4.1 TB/s, plus two launches of 2.5 us."""
    (entry,) = [
        e for e in TOLD["entries"]
        if e["case"] == "min_goal anchored" and e["direction"] == FORWARD and e["size"]["B"] == 2**20
    ]  # fmt: skip
    assert entry["work"] == bench_min_goal.TRAFFIC({"K": 9, "B": 2**20}, FORWARD) == 4 * 9 * 2**20
    assert entry["floor_us"] == pytest.approx(9.2 + 5, abs=0.1)


def made_up(off: float, impl: str = "cuda", name: str = "NVIDIA H200") -> Results:
    """Return made-up results: every prediction times ``off``."""
    rows = []
    for entry in TOLD["entries"]:
        if entry["direction"] != BACKWARD:
            us = off * entry["predicted_us"]
            about = {name: entry[name] for name in ("case", "direction", "size", "unit")}
            times = {"seconds": 1e-6 * us, "iqr": 0.0, "rounds": 5, "event_us": 2 * us, "graph_us": us}
            more = {"op": entry["case"].split()[0], "peer": "bomkern", "impl": impl, "work": 1.0, "rate": 1.0}
            rows.append({**about, **times, **more})
    return Results({**MACHINE, "name": name}, "2026-01-02T03:04:05", "pytest bench/ --benchmark-only", rows)


def table_of(results: Results) -> list[str]:
    return [line for line in page.predicted(results) if line.startswith("| ") and not line.startswith("|  |")]


def test_the_report_shows_them_side_by_side() -> None:
    rows = table_of(made_up(1.1))
    assert len(rows) == len(TOLD["entries"]) and not any("**" in row for row in rows)
    text = page.page([made_up(1.1)])
    assert "## Predicted, and measured" in text and f"0 of {len(rows)}, each a finding" in " ".join(text.split())
    assert max(len(line) for line in page.predicted(made_up(1.1)) if not line.startswith("|")) <= WIDTH


@pytest.mark.parametrize("off", [1.7, 0.6])
def test_a_miss_is_a_finding_with_its_reason(off: float) -> None:
    for row in table_of(made_up(off)):
        if ", backward |" not in row:  # backward is a difference of rounded numbers
            *_, found, reason, _ = (cell.strip() for cell in row.split("|"))
            assert found == f"**{off:.2f}x**" and reason


def test_events_count_where_no_graph_was_captured() -> None:
    found = made_up(1.0)
    for row in found.rows:
        row["graph_us"] = None
    assert all("**2.00x**" in row for row in table_of(found) if ", backward |" not in row)


def test_nothing_is_said_of_others() -> None:
    """The report compares no other GPU, no Triton result and no CPU with the predictions."""
    assert not page.predicted(made_up(1.0, name="NVIDIA L4"))
    assert not page.predicted(made_up(1.0, impl="triton"))
    assert not page.predicted(Results({**MACHINE, "device": "cpu"}, "", "", made_up(1.0).rows))


def test_what_was_not_measured_is_counted() -> None:
    found = made_up(1.0)
    found.rows = [row for row in found.rows if row["direction"] == BOTH and row["case"] == "gaussian_kl"]
    assert len(table_of(found)) == 4
    assert f"{len(TOLD['entries']) - 4} were not measured" in " ".join(" ".join(page.predicted(found)).split())
