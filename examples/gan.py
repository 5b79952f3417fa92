"""A VAE-GAN on scikit-learn's digits: reconstruction, length of the code, and realism for a live discriminator.

python examples/gan.py --picture gan.png  # about 40 s on one core; --steps 20 is a short form

The generator is trained by the bottleneck rule, by equal weights of the deficits, and by equal weights of the losses.
The discriminator has its own loss and optimizer, and takes its step after the generator's.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from bomkern import GoalSet, anchors, diagnose, gaussian_kl

RULES = OURS, DEFICITS, LOSSES = "bottleneck rule", "equal weights of deficits", "equal weights of losses"
LATENTS = 8
TRAIN, HELD_OUT = train_test_split(torch.tensor(load_digits().data / 16, dtype=torch.float32), random_state=0)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return reconstructions and as many new samples, [B, 64] each, and the KL divergence from the prior, [B]."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        code = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
        return self.decoder(code), self.decoder(torch.randn_like(mu)), gaussian_kl(mu, logvar)


def train(rule: str, steps: int) -> tuple[VAE, GoalSet]:
    torch.manual_seed(0)  # every rule has the same networks and the same batches
    vae, judge = VAE(), nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1), nn.Flatten(0))
    goals = GoalSet(
        recon=anchors.mse(TRAIN),
        kl=anchors.kl_budget(2.0 * LATENTS),  # nats: each latent may tell e^2 values apart
        realism=anchors.discriminator(),
        spill="auto",  # half of the gradient evenly, half by order
    )
    weights = {name: 1 / scale if rule == DEFICITS else 1.0 for name, (_, scale) in goals.anchors().items()}
    generating, judging = (torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.99)) for net in (vae, judge))
    for step in range(steps):
        x = TRAIN[torch.randint(len(TRAIN), (128,))]
        recon, fake, kl = vae(x)
        raw = {"recon": (recon - x).square().mean(1), "kl": kl, "realism": 1 - torch.sigmoid(judge(fake))}
        if step == 0 and rule == OURS:
            print("before the first step:", goals.check(raw))
        out = goals(raw)  # the goals also record the steps of the other rules
        loss = out.loss if rule == OURS else sum(weights[name] * value.mean() for name, value in raw.items())
        generating.zero_grad()
        loss.backward(inputs=list(vae.parameters()))  # the goals teach the generator alone
        generating.step()
        judging.zero_grad()
        (softplus(-judge(x)).mean() + softplus(judge(fake.detach())).mean()).backward()
        judging.step()
    return vae, goals


def frechet(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of two sets of images, taken as normal distributions of their pixels."""
    cov_a, cov_b = (x.double().T.cov() for x in (a, b))
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()  # the trace of the square root
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=3000)
parser.add_argument("--picture", metavar="FILE", help="where to save samples and deficits; they are not without it")
args = parser.parse_args()
runs = {rule: train(rule, args.steps) for rule in RULES}
goals = runs[OURS][1]
with torch.no_grad():
    answers = {rule: vae(HELD_OUT) for rule, (vae, _) in runs.items()}
psnr = {rule: float(-10 * (recon - HELD_OUT).square().mean().log10()) for rule, (recon, _, _) in answers.items()}
distance = {rule: frechet(samples, HELD_OUT) for rule, (_, samples, _) in answers.items()}
print(goals, diagnose(goals.history), sep="\n")
print(f"held-out PSNR, KL, and Frechet distance of new samples (training images: {frechet(TRAIN, HELD_OUT):.2f}):")
for rule, (_, _, kl) in answers.items():
    print(f"  {psnr[rule]:4.1f} dB  {float(kl.mean()):4.1f} nats  {distance[rule]:5.2f}  {rule}")
print(f"best PSNR: {max(psnr, key=psnr.get)}; best samples: {min(distance, key=distance.get)}")
if args.picture:
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained", sharey="row")
    window = max(1, len(goals.history) // 50)  # rows of the history that a point is the mean of
    for (above, below), (rule, (_, record)) in zip(axes.T, runs.items(), strict=True):
        tiles = pad(answers[rule][1][:32].view(4, 8, 8, 8), (1, 1, 1, 1), value=0.5)  # 4 rows of 8 samples
        above.imshow(tiles.transpose(1, 2).reshape(40, 80).numpy(), cmap="gray", vmin=0, vmax=1)
        above.set(title=f"new samples, {rule}\nFrechet distance {distance[rule]:.2f}", xticks=[], yticks=[])
        means = record.history["deficit"].unfold(0, window, window).mean(2)
        below.plot(record.history.steps[window - 1 :: window], means, label=goals.names)
        below.set(title=f"training, {rule}", xlabel="step", ylabel="deficit (0 ideal, 1 nadir)")
    below.legend()
    figure.savefig(args.picture, dpi=110)
