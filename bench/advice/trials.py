"""One trial: train, diagnose, follow the first advice, and train again from the same seed."""

from __future__ import annotations

import ast
import copy
import re
from typing import Any, NamedTuple

import torch

import bomkern
from bench.policies import rules
from bench.policies.faults import FAULTS, lift
from bench.policies.problem import Problem
from bench.policies.problems import PROBLEMS
from bench.policies.rules import Bottleneck
from bench.policies.run import train
from bomkern import Policy, diagnose

RULES: dict[str, dict[str, Any]] = {
    "minimum": {},
    "spill 1/2": {"spill": 1 / 2},
    "spill auto": {"spill": "auto"},
}
RULE = re.compile(r"GoalSet\(\.\.\., (\w+)=([^)]+)\)")
ANCHORS = re.compile(r"give (\S+) ((?:Anchored|Upper|Lower|Box)\([^)]*\))")
UNSURE = re.compile(r"^(none|if)\b")  # advice that depends on what only the user knows
EVERY = 50  # steps between measurements of moving anchors
ALARM = 0.5  # a finding of at least this confidence is followed


class Job(NamedTuple):
    """A trial: a problem, a planted fault, the rule of the first run, and a seed."""

    data: str
    fault: str
    rule: str
    seed: int


class Measured(Bottleneck):
    """A `GoalSet` whose moving goals are measured: what the judge, or a fault's lift, makes of both anchors."""

    def after(self, problem: Problem) -> None:
        if problem.step % EVERY:
            return
        assert self.goals is not None
        moving = {name for name, policy in self.goals.policies.items() if getattr(policy, "moving", False)}
        drift = lift(problem.fault, min(1.0, problem.step / problem.steps))[0]
        now: dict[str, Any] = {}
        for name in moving:
            ideal, nadir = problem.anchors[name]
            more = drift * (nadir - ideal) if name == problem.drifting else 0.0
            now[name] = rules.judged(problem) if name == "realism" else (ideal + more, nadir + more)
        if now:
            self.goals.remeasure(now)


def constraint_of(code: str) -> Any:
    """Make the constraint of a piece of code such as ``Anchored(0.5, 1, moving=True)``."""
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    named = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    return getattr(bomkern, call.func.id)(*map(ast.literal_eval, call.args), **named)


def follow(advice: str, goals: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return the goals and the options of a `GoalSet` with the change that an advice asks for.

    Args:
        advice: the suggestion of a finding. goals: constraints by name. options: of the GoalSet.

    Returns:
        None if the change is outside the GoalSet, such as another learning rate, or depends on what a user knows.
    """
    if UNSURE.search(advice):
        return None
    if rule := RULE.search(advice):
        return goals, {**options, rule[1]: ast.literal_eval(rule[2])}
    if given := ANCHORS.search(advice):
        return {**goals, given[1]: constraint_of(given[2])}, options
    return None


def outcome(problem: Problem, figures: dict[str, Any]) -> dict[str, float]:
    """Return the two figures by which runs are compared, both on the test split."""
    return {"main": problem.measure.of(figures["test"]), "worst": figures["test"]["worst"]}


def run(job: Job, steps: int | None = None) -> dict[str, Any]:
    """Run a trial, and return its record; ``after`` is missing where there was no advice to follow."""
    torch.set_num_threads(1)

    def trained(goals: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, float], Measured]:
        problem, arm = kind(job.seed, FAULTS[job.fault], steps), Measured(lambda _: copy.deepcopy(goals), **options)
        return outcome(problem, train(problem, arm)), arm

    kind = PROBLEMS[job.data]
    goals: dict[str, Policy] = rules.anchored(kind)  # type: ignore[arg-type]
    options = RULES[job.rule]
    before, arm = trained(goals, options)
    assert arm.goals is not None
    record: dict[str, Any] = {**job._asdict(), "before": before}
    found = [finding for finding in diagnose(arm.goals.history).faults if finding.confidence >= ALARM]
    if not found:
        return record
    record |= {"kind": found[0].kind, "sure": found[0].confidence, "advice": found[0].suggestion}
    record["evidence"] = found[0].evidence
    changed = follow(found[0].suggestion, goals, options)
    if changed is not None:
        record["after"] = trained(*changed)[0]
    return record
