"""Thirteen tasks of one network on scikit-learn's digits: losses in nats and in squared grey levels.

python examples/many_tasks.py --picture many_tasks.png  # about 15 s on one core; --steps 20 is a short form

Ten heads tell one digit from the rest, and three give parity, the mean ink, and the pixels without noise. The same
network is trained by the bottleneck rule, by equal weights of the deficits, and by equal weights of the losses.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from bomkern import GoalSet, anchors, diagnose

RULES = OURS, DEFICITS, LOSSES = "bottleneck rule", "equal weights of deficits", "equal weights of losses"
PIXELS, LABELS = (torch.tensor(x) for x in load_digits(return_X_y=True))
PIXELS = PIXELS.float()  # [1797, 64] in grey levels, 0 to 16
BINARY = torch.cat([one_hot(LABELS), LABELS[:, None] % 2], 1).float()  # [1797, 11]
INK = PIXELS.mean(1)
TASKS = [*(f"digit {d}" for d in range(10)), "parity", "ink", "pixels"]
TRAIN, HELD_OUT = (torch.tensor(rows) for rows in train_test_split(range(len(LABELS)), random_state=0))


def losses(net: nn.Module, rows: Tensor, noise: float = 0.0) -> dict[str, Tensor]:
    """Return the loss of each task, [B]: cross entropies in nats, squared errors in squared grey levels."""
    seen = PIXELS[rows] + noise * torch.randn(len(rows), 64)
    logits, ink, pixels = net(seen / 16).split([11, 1, 64], dim=1)
    binary = binary_cross_entropy_with_logits(logits, BINARY[rows], reduction="none")  # [B, 11]
    squared = [(ink[:, 0] - INK[rows]).square(), (pixels - PIXELS[rows]).square().mean(1)]
    return dict(zip(TASKS, [*binary.unbind(1), *squared], strict=True))


def train(rule: str, steps: int) -> tuple[Tensor, GoalSet]:
    """Return the held-out deficits, [13], and the goals."""
    torch.manual_seed(0)  # every rule has the same network and the same batches
    net = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 12), nn.SiLU(), nn.Linear(12, 76))
    goals = GoalSet(
        {task: anchors.bce(labels) for task, labels in zip(TASKS[:11], BINARY[TRAIN].T, strict=True)}
        | {"ink": anchors.mse(INK[TRAIN]), "pixels": anchors.mse(PIXELS[TRAIN])},
        spill="auto",  # half of the gradient evenly, half by order, less to tasks that are worse than nothing
    )
    if rule == OURS:
        print("before the first step:", goals.check(losses(net, TRAIN)))
    weights = {name: 1 / scale if rule == DEFICITS else 1.0 for name, (_, scale) in goals.anchors().items()}
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        raw = losses(net, TRAIN[torch.randint(len(TRAIN), (64,))], noise=3.0)
        out = goals(raw)  # the goals also record the steps of the other rules
        loss = out.loss if rule == OURS else sum(weights[name] * value.mean() for name, value in raw.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return goals.eval()(losses(net, HELD_OUT))["deficit"], goals


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--picture", metavar="FILE", help="where to save the deficits; they are not without it")
args = parser.parse_args()
runs = {rule: train(rule, args.steps) for rule in RULES}
goals = runs[OURS][1]
print(goals, diagnose(goals.history), "held-out deficits (0 perfect, 1 no better than the frequencies):", sep="\n")
print(f"  {'':10}", *(f"{rule:>26}" for rule in RULES), sep="")
rows = dict(zip(TASKS, torch.stack([deficits for deficits, _ in runs.values()], 1), strict=True))
table = torch.stack(list(rows.values()))  # [13, 3]
rows |= {"mean": table.mean(0), "worst": table.amax(0)}
for name, numbers in rows.items():
    print(f"  {name:10}", *(f"{number:26.3f}" for number in numbers.tolist()), sep="")
print(*(f"lowest {name} deficit: {RULES[int(rows[name].argmin())]}" for name in ("mean", "worst")), sep="\n")
if args.picture:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    window = max(1, len(goals.history) // 50)  # rows of the history that a point is the mean of
    for k, (rule, (deficits, record)) in enumerate(runs.items()):
        worst = record.history["deficit"].amax(1).unfold(0, window, window).mean(1)
        left.plot(record.history.steps[window - 1 :: window], worst, label=rule)
        right.bar([task + 0.27 * (k - 1) for task in range(13)], deficits.tolist(), 0.27, label=rule)
    left.set(title="worst task of a training batch", xlabel="step", ylabel="deficit (0 ideal, 1 nadir)", yscale="log")
    right.set(title="held-out tasks", ylabel="deficit (0 ideal, 1 nadir)", xlabel="task")
    right.set_xticks(range(13), TASKS, rotation=60)
    left.legend()
    figure.savefig(args.picture, dpi=110)
