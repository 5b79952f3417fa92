"""VICReg on scikit-learn's digits: invariance, variance and covariance as three goals, judged by a linear probe.

python examples/vicreg.py --picture vicreg.png  # about 20 s on one core; --steps 20 is a short form

An encoder learns from pairs of views without labels (Bardes, Ponce & LeCun 2022): by the bottleneck rule, by equal
weights of the deficits, and by the weights of the paper. A linear classifier then learns 100 labels from its features.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, relu

from bomkern import Anchored, GoalSet, anchors, covariance_penalty, diagnose

RULES = OURS, DEFICITS, PAPER = "bottleneck rule", "equal weights of deficits", "25 : 25 : 1 of the paper"
BATCH, WIDTH = 128, 64  # WIDTH is that of the embedding, whose losses are taken
IMAGES = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8] in [0, 1]
TRAIN, HELD_OUT, TRAIN_LABELS, LABELS = train_test_split(IMAGES, load_digits().target, random_state=0)


def view(images: Tensor) -> Tensor:
    """Return images [B, 1, 8, 8] with a small random shift, turn and shear, and with noise: [B, 64]."""
    maps = torch.eye(2, 3) + 0.1 * torch.randn(len(images), 2, 3)
    warped = grid_sample(images, affine_grid(maps, list(images.shape), align_corners=False), align_corners=False)
    return (warped + 0.2 * torch.randn_like(warped)).flatten(1)


def losses(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the losses of two views of images: [B], 0-dim and [B]."""
    a, b = net(view(images)), net(view(images))
    return {
        "invariance": (a - b).square().mean(1),
        "variance": sum(relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean() for z in (a, b)) / 2,
        "covariance": (covariance_penalty(a) + covariance_penalty(b)) / 2,
    }


def train(rule: str, steps: int) -> tuple[nn.Module, GoalSet]:
    torch.manual_seed(0)  # every rule has the same network and the same views
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
    net = nn.Sequential(encoder, nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    goals = GoalSet(
        invariance=Anchored(0.0, 2.0),  # the squared difference of two unrelated codes of variance 1
        variance=anchors.variance_hinge(),
        covariance=anchors.covariance(BATCH, WIDTH),
        spill="auto",  # half of the gradient evenly, half by order
    )
    weights = {name: 1 / scale for name, (_, scale) in goals.anchors().items()}
    if rule == PAPER:
        weights = {"invariance": 25.0, "variance": 25.0, "covariance": 2.0}  # 1 for each of the two views
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(steps):
        raw = losses(net, TRAIN[torch.randint(len(TRAIN), (BATCH,))])
        out = goals(raw)  # the goals also record the steps of the other rules
        loss = out.loss if rule == OURS else sum(weights[name] * value.mean() for name, value in raw.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder, goals


@torch.no_grad()
def probe(encoder: nn.Module) -> float:
    """Return the held-out accuracy of a linear classifier: the mean over 10 sets of 100 labels."""
    seen, unseen, linear = encoder(TRAIN.flatten(1)), encoder(HELD_OUT.flatten(1)), LogisticRegression(max_iter=1000)
    sets = [slice(start, start + 100) for start in range(0, 1000, 100)]
    return sum(linear.fit(seen[few], TRAIN_LABELS[few]).score(unseen, LABELS) for few in sets) / len(sets)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--picture", metavar="FILE", help="where to save the deficits; they are not without it")
args = parser.parse_args()
runs = {rule: train(rule, args.steps) for rule in RULES}
accuracy = {rule: probe(encoder) for rule, (encoder, _) in runs.items()}
goals = runs[OURS][1]
print(goals, diagnose(goals.history), "held-out accuracy of a linear probe:", sep="\n")
print(*(f"  {value:.3f}  {rule}" for rule, value in accuracy.items()), sep="\n")
print(f"  {probe(nn.Identity()):.3f}  the pixels themselves\nmost accurate: {max(accuracy, key=accuracy.get)}")
if args.picture:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", sharey=True)
    window = max(1, len(goals.history) // 50)  # rows of the history that a point is the mean of
    for ax, (rule, (_, record)) in zip(axes, runs.items(), strict=True):
        means = record.history["deficit"].unfold(0, window, window).mean(2)
        ax.plot(record.history.steps[window - 1 :: window], means, label=goals.names)
        ax.set(title=f"{rule}\naccuracy of a linear probe {accuracy[rule]:.3f}", xlabel="step")
    axes[0].set_ylabel("deficit (0 ideal, 1 nadir)")
    axes[0].legend()
    figure.savefig(args.picture, dpi=110)
