"""The bottleneck rule for named goals: `GoalSet`, its policies, its history and its step guard."""
