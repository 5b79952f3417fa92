"""Three goals in a Lightning Fabric loop on several processes: a small VAE on scikit-learn's digits.

python examples/fabric_loop.py 2  # the number of processes; some seconds
"""

import sys

import torch
from lightning_fabric import Fabric  # or: from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn

from bomkern import Anchored, GoalSet, StepGuard, covariance_penalty, gaussian_kl

MICRO_BATCHES, SAMPLES = 2, 128  # a step has this many samples, whatever the number of processes


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
        return self.decoder(z), mu, logvar, z


fabric = Fabric(accelerator="cpu", devices=int(sys.argv[1]), strategy="ddp")
fabric.launch()
fabric.seed_everything(0, verbose=False)
group = torch.distributed.group.WORLD
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)  # [1797, 64] in [0, 1]
trivial = float((images - images.mean(0)).square().mean())  # the error of the mean image
anchors = {"recon": Anchored(0.0, trivial), "kl": Anchored(0.0, 25.0), "apart": Anchored(7 / 63, 7.0)}
goals = GoalSet(anchors, spill="auto", process_group=group).to(fabric.device)
model = VAE()
model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True))
guard = StepGuard(optimizer, goals=goals, process_group=group)  # all ranks take a step, or none
torch.manual_seed(fabric.global_rank)  # every rank has its own samples
for _ in range(100):
    for micro in range(MICRO_BATCHES):
        last = micro == MICRO_BATCHES - 1
        x = images[torch.randint(len(images), (SAMPLES // MICRO_BATCHES // fabric.world_size,))]
        with fabric.no_backward_sync(model, enabled=not last), goals.accumulate(last=last):
            y, mu, logvar, z = model(x)
            apart = covariance_penalty(z, normalize=True, process_group=group)
            out = goals({"recon": (y - x).square().mean(1), "kl": gaussian_kl(mu, logvar), "apart": apart})
            fabric.backward(out.loss / MICRO_BATCHES)
    guard.step()
    guard.zero_grad()
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
assert torch.equal(fabric.broadcast(weights), weights)  # the ranks agree
if fabric.is_global_zero:
    print(goals, f"{int(guard.rejected)} steps were rejected", sep="\n")
