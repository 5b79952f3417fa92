"""The confidence of the findings of `bomkern.diagnose`, and all thresholds that they depend on.

**Confidence.** The confidence of a finding is that of its weakest piece of evidence, and at most `SUREST`, since one
run can mislead. Every piece is a `ramp`: 0 at a value that proves nothing, 1 at a value that leaves no doubt:

- a trend's t, corrected for autocorrelation (`trends.trend`): 0 at `T_NONE`, 1 at `T_FULL`;
- the length of the window as a fraction of the run;
- the size of the effect in scales of the goal, so that a certain but small effect counts little;
- the share of the gradient that the goal held, or did not hold;
- evidence particular to the kind, which its detector names.

**Severity** = weight of the `Kind` * confidence * sqrt(fraction of the run): causes come before their effects.
"""

from __future__ import annotations

import re

LEAST_ROWS = 20  # rows of a history: fewer say nothing about trends
SUREST = 0.95  # largest confidence: one run without gradients can suggest a cause, but not prove it
LEAST = 0.25  # smallest confidence of a finding that is shown
T_NONE, T_FULL = 2.5, 6.0  # chance reaches 2 in one of 20 windows, but windows are selected for their rise
STARVED = 0.01  # share: less than one sample in three batches of 32
HOLDS = 0.5  # share: most of the samples
PART = 0.1, 0.35  # share: enough for the rule, which improves the worst goal, to make it better
LOCKED = 0.5, 0.8  # share: because of noise between samples, others get some even when one goal is locked
SPAN = 0.05, 0.2  # fraction of the run that a window must last: goals take turns in shorter ones
CHANGE = 0.05, 0.25  # scales that a goal must move: anchors are uncertain by about a tenth
CLIMB = 0.1, 0.4  # scales that a moving target must rise: batches differ by more than a tenth
HARM = 0.1, 0.4  # deficit that a goal must end at to be badly off
STILL = 0.3  # part of its deficit that a locked goal may still move
WAIT = 0.0, 0.4  # fraction of the others that improve little or not
CARRIED = 0.7, 0.4  # confidence in a lock while the others improve; the second if the rule gives each a part
GOES_ON = 0.2, 0.5  # part of its deficit that a goal has still to gain at its pace: slow, not locked
SCANT = 0.25  # part of an equal share that the rule leaves to the last goal: less is nearly nothing
GAP = 0.03, 0.12  # deficit of a locked goal above the others: goals in balance have the same deficit
FAR = 5.0, 20.0  # lower quartile of |distance| in scales: typically above 10, the scale does not fit these values
LONG = 15.0, 45.0  # the same in the first third, for a goal that falls in the end: doing nothing costs 1
NEAR = 0.02, 0.01  # upper quartile of |distance| in scales: typically below 0.01, the scale does not fit either
UNUSED = 0.05  # scales that no sample exceeded in the first half: a goal that training satisfied exceeded them
FELL = 0.3, 0.6  # part by which raw fell from its start: doing nothing should cost about a scale
SPARED = 0.4, 0.2  # share: a scale that is too large keeps the goal from the gradient until the others are satisfied
NEGLECT = 0.5  # confidence in a scale that is too large while raw does not suffer from it
OUTGROWN = 1.0, 2.0  # scales of a goal that was calibrated by its largest value: its values were at most 1 then
WIDE = 3.0, 8.0  # range of values in scales, over the run or in a batch: with anchors that fit it is about 1
PULL = 0.8, 0.95  # estimated part of the gradient's norm: nearly all, since the estimate is rough
NOT_ALL = 0.75, 0.5  # share: a goal with nearly all samples is expected to have nearly all of the norm
DRIFT = 0.5, 1.5  # scales by which anchors may drift: `Anchored`'s default alarm, and three times that
OUTSIDE = 0.2, 0.5  # fraction of the run outside a box: raw may be far from it at first
BEYOND = 0.0, 0.2  # half-widths outside the box: at the edge, noise decides
TRIED = 0.02, 0.2  # share: without any, training did not try to get into the box
NEVER = 0.5  # confidence if training did not try, and raw was never inside
ARRIVES = 0.2  # confidence if raw still moves towards the box and is going to reach it
REACHED = 0.4  # confidence if the goal got in when it was trained alone: other goals keep it out
PAIR = 0.1, 0.6  # share of each, and of both together, in every row of the window
PAIR_SHARE = 0.6, 0.85  # share of both over the window: a pair in conflict leaves little to others
PAIR_SPAN = 0.1, 0.3  # fraction of the run: goals that fall together have the same deficit for a while
PAIR_HARM = 0.25, 0.6  # deficit of both: every healthy run has compromises that cost something
STALEMATE = 0.7  # confidence in a conflict whose only evidence is a stalemate
PACE = 0.5, 0.2  # part of its deficit that either would move over the run, at its pace in the window
AHEAD = 5  # number of windows over which the pace of one is extrapolated
DENIED = 0.3  # confidence if the payoff table shows no conflict: then both are at floors
COST = 0.5  # scales that training on one goal alone costs another in a conflict
EVEN = 0.3, 0.1  # relative difference of their deficits: the rule makes them equal
HALF = 3  # rows in half a block: few, since opposite motion shows best between neighbours
MANY = 4, 8  # goals: of few, each that fares badly has a finding of its own
CROWD = 0.5, 0.75  # median of the deficits at the end: most goals are hardly better than a trivial answer
GONE, NEARLY = 0.01, 0.1  # part of its peak that a collapsed KL keeps; part of all units that may still be active
EMPTY = 1.0, 0.1  # nats that a collapsed KL keeps: a code of more holds information, however high its peak was
ALONE = 0.6  # confidence in a collapse that no count of units confirms
HIGH = 0.7, 1.0  # level of a satisfied goal: 1 is its ideal
BEATEN = 0.1, 0.3  # scales by which a goal is better than its ideal: anchors are uncertain by about a tenth
RHYTHM = 0.2, 0.4  # regularity of a share that swings: chance reaches 0.25 in one of 150 series that keep their value
SWING = 0.02, 0.06  # standard deviation of a share that swings: less than this changes nothing
LAST = 5  # the part of a run, 1/5, whose mean is the value that a goal ends at
LOST = 0.0, 0.02  # fraction of steps without a finite loss: one in a hundred is no accident
KL = re.compile(r"(^|[^a-z])kl", re.IGNORECASE)  # "kl_divergence" and "latent.kl", not "sparkle"
UNITS = re.compile(r"capacity|active", re.IGNORECASE)
