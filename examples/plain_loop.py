"""Three goals in a plain loop: a small VAE on scikit-learn's digits. `python examples/plain_loop.py`, some seconds."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from bomkern import Anchored, GoalSet, StepGuard, covariance_penalty, diagnose, gaussian_kl

torch.manual_seed(0)
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)  # [1797, 64] in [0, 1]
trivial = float((images - images.mean(0)).square().mean())  # the error of the mean image
encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
goals = GoalSet(
    recon=Anchored(0.0, trivial),
    kl=Anchored(0.0, 25.0),  # nats
    apart=Anchored(7 / 127, 7.0),  # squared correlations of 8 latents: chance alone, and all of them one
    spill=0.5,
)
optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=5e-3, fused=True)
guard = StepGuard(optimizer, goals=goals)  # a step with a NaN or inf changes nothing
for _ in range(1000):
    x = images[torch.randint(len(images), (128,))]
    mu, logvar = encoder(x).chunk(2, dim=1)
    z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
    recon, apart = (decoder(z) - x).square().mean(1), covariance_penalty(z, normalize=True)
    out = goals({"recon": recon, "kl": gaussian_kl(mu, logvar), "apart": apart})
    guard.zero_grad()
    out.loss.backward()
    guard.step(out.finite)
print(goals, diagnose(goals.history), f"{int(guard.rejected)} steps were rejected", sep="\n")
