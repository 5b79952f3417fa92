"""How sure `bomkern.diagnose` is of what it finds, and every threshold that it goes by.

**Confidence.** A finding is as sure as the weakest piece of its evidence, and never surer than `SUREST`, for one run
can mislead. Every piece is a `ramp`: 0 at a value that proves nothing, 1 at one that leaves no doubt of it. The pieces:

- a trend's t, autocorrelation allowed for (`trends.trend`): 0 at `T_NONE`, 1 at `T_FULL`;
- the length of the window as a fraction of the run;
- the size of the effect, in scales of the goal, so that what is certain but does not matter counts little;
- the share held, or not held;
- what is particular to the kind: named at its detector.

**Severity** = weight of the `Kind` * confidence * sqrt(fraction of the run): causes come before what they cause.
"""

from __future__ import annotations

import re

LEAST_ROWS = 20  # of a history: fewer say nothing about trends
SUREST = 0.95  # one run, and no gradients: enough to suspect a cause, never to prove it
LEAST = 0.25  # what is less sure than this is not worth a reader's time
T_NONE, T_FULL = 2.5, 6.0  # chance reaches 2 in one look of 20; but windows are chosen for their rise, among dozens
STARVED = 0.01  # share: less than one sample in three batches of 32
HOLDS = 0.5  # share: most of the samples
PART = 0.1, 0.35  # share: enough that the rule, which lifts the worst goal, should make it better
LOCKED = 0.5, 0.8  # share: with noise between samples, others get some even when one goal is locked
SPAN = 0.05, 0.2  # fraction of the run that a window must last: shorter ones are how goals take turns
CHANGE = 0.05, 0.25  # scales that a goal must move: a tenth is what anchors are uncertain by
CLIMB = 0.1, 0.4  # scales that a moving target must move up: batches differ by more than a tenth
HARM = 0.1, 0.4  # deficit that a goal must end at to be badly off
STILL = 0.3  # part of its deficit that a locked goal may still move
WAIT = 0.0, 0.4  # fraction of the others that improve little or not
CARRIED = 0.7  # confidence in a lock while the others get better on their own, as shared parameters carry them along
GAP = 0.03, 0.12  # deficit by which a locked goal stands out: goals in balance are level
FAR = 5.0, 20.0  # scales of the lower quartile of |distance|: typically above 10, the scale is not of these values
LONG = 15.0, 45.0  # the same in the first third, for a goal that comes down in the end: doing nothing costs 1
NEAR = 0.02, 0.01  # scales of the upper quartile: typically below 0.01, likewise
UNUSED = 0.05  # scales that no sample exceeded in the first half: else the goal was brought down, and is satisfied
FELL = 0.3, 0.6  # part by which raw fell from where it started: nothing done should cost about a scale
SPARED = 0.4, 0.2  # share: a scale that is too large keeps the goal from the gradient until the others are done
NEGLECT = 0.5  # confidence in a scale that is too large, where raw does not suffer from it
OUTGROWN = 1.0, 2.0  # scales of a goal calibrated by its largest value, of which all values were at most 1
WIDE = 3.0, 8.0  # range of values in scales, over the run or in a batch: with anchors that fit it is about 1
PULL = 0.8, 0.95  # estimated part of the gradient's norm: nearly all, as the estimate is rough
NOT_ALL = 0.75, 0.5  # share: who has nearly all samples has nearly all of the norm, and that is no riddle
DRIFT = 0.5, 1.5  # scales by which anchors may drift: `Anchored`'s default alarm, and three times that
OUTSIDE = 0.2, 0.5  # fraction of the run outside a box: it may be far at first
BEYOND = 0.0, 0.2  # half-widths outside it: at the edge, noise decides
TRIED = 0.02, 0.2  # share: with none, nobody tried to get in
NEVER = 0.5  # confidence where nobody tried, but raw never was in either
ARRIVES = 0.2  # confidence where raw is still on its way, and heading into the box
REACHED = 0.4  # confidence where the goal got in when trained alone: then it is others that keep it out
PAIR = 0.1, 0.6  # share of each, and of both: below it they are two goals among others
PAIR_SHARE = 0.6, 0.85  # share of both over the window: a pair in conflict leaves others little
PAIR_SPAN = 0.1, 0.3  # fraction of the run: goals that come down together are level for a while
PAIR_HARM = 0.25, 0.6  # deficit of both: compromises cost something in every healthy run
STALEMATE = 0.7  # confidence in a conflict that only shows as a stalemate
PACE = 0.5, 0.2  # part of its deficit that either would move over the run, at its pace in the window
AHEAD = 5  # windows that the pace of one is believed for
DENIED = 0.3  # confidence where the payoff table shows no conflict: then it is two floors
COST = 0.5  # scales that training on one goal alone costs another, where they are in conflict
EVEN = 0.3, 0.1  # relative difference of their deficits: the rule brings them to one level
HALF = 3  # rows in half a block: short, as opposed motion shows best between neighbours
GONE, NEARLY = 0.01, 0.1  # of its peak: what is left of a collapsed KL; of all units: what may still be active
EMPTY = 1.0, 0.1  # nats that a collapsed KL is left with: a code of more still says something, however high it began
ALONE = 0.6  # confidence in a collapse that no count of units confirms
HIGH = 0.7, 1.0  # level of a satisfied goal: 1 is its ideal
LOST = 0.0, 0.02  # fraction of the steps that are lost: one in a hundred is no accident
KL = re.compile(r"(^|[^a-z])kl", re.IGNORECASE)  # "kl_divergence" and "latent.kl", not "sparkle"
UNITS = re.compile(r"capacity|active", re.IGNORECASE)
