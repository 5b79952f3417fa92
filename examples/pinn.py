"""A physics-informed network (PINN) for Helmholtz's equation: two goals, and no weight that is set by hand.

python examples/pinn.py --picture pinn.png  # about 50 s on one core; --steps 20 is a short form

It solves u_xx + u_yy + u = q in the square [-1, 1]^2, u = 0 around it (Wang, Teng & Perdikaris 2021). The same network
is trained by the bottleneck rule, by equal weights of both deficits, and by equal weights of both losses.
"""

import argparse
import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.autograd import grad

from bomkern import GoalSet, anchors, diagnose

RULES = OURS, DEFICITS, LOSSES = "bottleneck rule", "equal weights of deficits", "equal weights of losses"
WAVES = math.pi * torch.tensor([1.0, 4.0])
GRID = torch.cartesian_prod(torch.linspace(-1, 1, 101), torch.linspace(-1, 1, 101))  # [10201, 2]


def exact(points: Tensor) -> Tensor:
    """Return the solution at points [n, 2]: sin(pi x) sin(4 pi y), [n]."""
    return torch.sin(WAVES * points).prod(1)


def source(points: Tensor) -> Tensor:
    """Return q at points [n, 2], [n]."""
    return (1 - WAVES.square().sum()) * exact(points)


def losses(net: nn.Module) -> dict[str, Tensor]:
    """Return squared errors at new random points: of the equation inside, [256], and at the edge, [128]."""
    inside, edge = 2 * torch.rand(256, 2) - 1, 2 * torch.rand(128, 2) - 1
    rows, axis = torch.arange(128), torch.arange(128) % 2
    edge[rows, axis] = edge[rows, axis].sign()  # -1 or 1: one of the four sides
    inside.requires_grad_()
    u = net(inside)[:, 0]
    (slope,) = grad(u.sum(), inside, create_graph=True)
    u_xx, u_yy = (grad(slope[:, i].sum(), inside, create_graph=True)[0][:, i] for i in range(2))
    return {"equation": (u_xx + u_yy + u - source(inside)).square(), "edge": net(edge)[:, 0].square()}


def train(rule: str, steps: int) -> tuple[nn.Module, GoalSet]:
    torch.manual_seed(0)  # every rule has the same network and the same points
    layers = [layer for width in (2, 50, 50) for layer in (nn.Linear(width, 50), nn.Tanh())]
    net = nn.Sequential(*layers, nn.Linear(50, 1))
    q = source(GRID)
    goals = GoalSet(
        equation=anchors.residual(q),
        # u = 0 meets the edge, so its error is no nadir: the size of a solution that nothing holds there is one.
        edge=anchors.boundary(torch.zeros(1), scale=anchors.solution_scale(q, lengths=[2.0, 2.0])),
        spill="auto",  # half of the gradient evenly, half by order
    )
    weights = {name: 1 / scale if rule == DEFICITS else 1.0 for name, (_, scale) in goals.anchors().items()}
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(steps):
        raw = losses(net)
        out = goals(raw)  # the goals also record the steps of the other rules
        loss = out.loss if rule == OURS else sum(weights[name] * value.mean() for name, value in raw.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net, goals


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=3000)
parser.add_argument("--picture", metavar="FILE", help="where to save the solution and the errors; not without it")
args = parser.parse_args()
runs = {rule: train(rule, args.steps) for rule in RULES}
goals, u = runs[OURS][1], exact(GRID)
with torch.no_grad():
    off = {rule: (net(GRID)[:, 0] - u).abs() for rule, (net, _) in runs.items()}
error = {rule: float(distance.norm() / u.norm()) for rule, distance in off.items()}
print(goals, diagnose(goals.history), sep="\n")
print("relative L2 error of the solution:", *(f"  {error[rule]:.3f}  {rule}" for rule in RULES), sep="\n")
print(f"nearest to the exact solution: {min(error, key=error.get)}")
if args.picture:
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.7), layout="constrained", sharey=True)
    square = {"extent": (-1, 1, -1, 1), "origin": "lower"}
    image = axes[0].imshow(u.view(101, 101).T.numpy(), cmap="RdBu_r", **square)
    axes[0].set(title="exact solution", xlabel="x, dimensionless", ylabel="y, dimensionless")
    figure.colorbar(image, ax=axes[0], label="u, dimensionless", fraction=0.046)
    for ax, rule in zip(axes[1:], RULES, strict=True):
        image = ax.imshow(off[rule].view(101, 101).T.numpy(), norm="log", vmin=1e-3, vmax=1, **square)
        ax.set(title=f"{rule}\nrelative L2 error {error[rule]:.3f}", xlabel="x, dimensionless")
    figure.colorbar(image, ax=axes[1:], label="|error| of u, dimensionless", fraction=0.016, extend="both")
    figure.savefig(args.picture, dpi=110)
