"""Water filling, diagnosed: a VAE whose discriminator learns, with automatic scales, with scales by hand, and anchored.

python examples/water_filling.py --picture water_filling.png  # about 40 s on one core; --steps 20 is a short form

The first two train `-log(min score)`, configured as people have it; the last one, with a spill, heals the run.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import softplus

from bomkern import GoalSet, active_units, anchors, consistency_variance, diagnose, gaussian_kl

LATENTS = 8
TRAIN, HELD_OUT = train_test_split(torch.tensor(load_digits().data / 16, dtype=torch.float32), random_state=0)
NAMES = ("reconstruction", "kl_divergence", "realism", "consistency", "capacity")
AUTO = {name: {"type": "MINIMIZE_SOFT", "scale": "auto"} for name in NAMES}
BY_HAND = {
    **AUTO,
    "realism": {"type": "MINIMIZE_SOFT", "scale": 2.0},
    "consistency": {"type": "MINIMIZE_SOFT", "scale": 500.0},
    "capacity": {"type": "MINIMIZE_SOFT", "scale": 0.4},
}
ANCHORED = {
    "reconstruction": {"type": "ANCHORED", "ideal": 0.0, "nadir": anchors.mse(TRAIN).known["nadir"]},  # the mean image
    "kl_divergence": {"type": "ANCHORED", "ideal": 0.0, "nadir": 2.0 * LATENTS},  # nats: a budget
    "realism": {"type": "ANCHORED", "ideal": 0.5, "nadir": 1.0},  # a judge that cannot tell, and one that is certain
    "consistency": {"type": "ANCHORED", "ideal": 0.0, "nadir": 1.0},  # views as far apart as two images
    "capacity": {"type": "ANCHORED", "ideal": 0.0, "nadir": 1.0},  # the part of the latents that is unused
}
RUNS = {
    "automatic scales": GoalSet.from_config(AUTO, reduction="min"),
    "scales by hand": GoalSet.from_config(BY_HAND, reduction="min"),
    "anchored, spill": GoalSet.from_config(ANCHORED, spill="auto"),
}


def train(goals: GoalSet, steps: int) -> tuple[nn.Module, list[dict[str, float]]]:
    """Return the trained networks, and the deficits by the anchors in every step, whatever the run's own scales say."""
    torch.manual_seed(0)  # every run has the same networks and the same batches
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENTS))
    decoder = nn.Sequential(nn.Linear(LATENTS, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
    vae = nn.ModuleList([encoder, decoder])
    judge = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1), nn.Flatten(0))
    generating, judging = (torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.99)) for net in (vae, judge))
    deficits = []
    for _ in range(steps):
        x = TRAIN[torch.randint(len(TRAIN), (128,))]
        view = (x * torch.exp(0.2 * torch.randn(len(x), 1)) + 0.15 * torch.randn_like(x)).clamp(0, 1)
        (mu, other), (logvar, _) = (part.chunk(2) for part in encoder(torch.cat([x, view])).chunk(2, dim=1))
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
        recon = decoder(z)
        raw: dict[str, Tensor] = {
            "reconstruction": (recon - x).square().mean(1),
            "kl_divergence": gaussian_kl(mu, logvar),
            "realism": 1 - torch.sigmoid(judge(recon)),
            "consistency": consistency_variance([mu, other]) / z.var(0).detach().mean(),
            "capacity": 1 - sum(active_units(mu)) / 2,
        }
        loss = goals(raw).loss
        generating.zero_grad()
        loss.backward(inputs=list(vae.parameters()))  # the goals teach the generator alone
        generating.step()
        judging.zero_grad()
        (softplus(-judge(x)).mean() + softplus(judge(recon.detach())).mean()).backward()
        judging.step()
        means = {name: float(value.detach().mean()) for name, value in raw.items()}
        deficits.append({k: (means[k] - a["ideal"]) / (a["nadir"] - a["ideal"]) for k, a in ANCHORED.items()})
    return vae, deficits


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--picture", metavar="FILE", help="where to save shares and deficits; they are not without it")
args = parser.parse_args()
ends = {name: train(goals, args.steps) for name, goals in RUNS.items()}
for name, (vae, deficits) in ends.items():
    with torch.no_grad():
        psnr = float(-10 * (vae[1](vae[0](HELD_OUT)[:, :LATENTS]) - HELD_OUT).square().mean().log10())
    print(f"== {name}: held-out PSNR {psnr:.1f} dB, worst deficit by the anchors {max(deficits[-1].values()):.2f}")
    print(RUNS[name], diagnose(RUNS[name].history), "", sep="\n")
if args.picture:
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained", sharey="row", sharex=True)
    window = max(1, args.steps // 60)  # steps that a point is the mean of
    for (above, below), (name, (_, deficits)) in zip(axes.T, ends.items(), strict=True):
        for values, axis in (
            (RUNS[name].history["share"], above),
            (torch.tensor([[*d.values()] for d in deficits]), below),
        ):
            axis.plot(range(window, len(values) + 1, window), values.unfold(0, window, window).mean(2), label=NAMES)
        above.set(title=name, ylabel="share of the gradient", ylim=(0, 1))
        below.set(xlabel="step", ylabel="deficit by the anchors (0 ideal, 1 nadir)", ylim=(0, 2.5))
    below.legend()
    figure.savefig(args.picture, dpi=110)
