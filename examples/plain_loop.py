"""Three goals in a plain loop: a small VAE on scikit-learn's digits. `python examples/plain_loop.py`, some seconds."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from bomkern import GoalSet, StepGuard, anchors, covariance_penalty, diagnose, gaussian_kl

torch.manual_seed(0)
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)  # [1797, 64] in [0, 1]
encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
goals = GoalSet(
    recon=anchors.mse(images),  # 1 is the error of the mean image
    kl=anchors.kl_budget(25.0),  # nats
    apart=anchors.covariance(128, 8),  # of 8 latents in a batch of 128: chance alone, and two copies of each
    spill="auto",
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
