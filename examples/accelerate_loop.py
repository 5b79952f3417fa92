"""Three goals in an Accelerate loop: a small VAE on scikit-learn's digits.

accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py FOLDER  # called again, it goes on from FOLDER
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bomkern import Anchored, GoalSet, StepGuard, covariance_penalty, gaussian_kl


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
        return self.decoder(z), mu, logvar, z


torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)  # [1797, 64] in [0, 1]
trivial = float((images - images.mean(0)).square().mean())  # the error of the mean image
anchors = {"recon": Anchored(0.0, trivial), "kl": Anchored(0.0, 25.0), "apart": Anchored(7 / 63, 7.0)}
goals = GoalSet(anchors, spill="auto", process_group=group).to(accelerator.device)
model = VAE()
model, optimizer, loader = accelerator.prepare(
    model,
    torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True),
    DataLoader(TensorDataset(images), batch_size=64, shuffle=True, drop_last=True),
)
guard = StepGuard(optimizer, goals=goals, process_group=group)  # all ranks take a step, or none
accelerator.register_for_checkpointing(goals, guard)
folder = Path(sys.argv[1])
if folder.is_dir():
    accelerator.load_state(folder)
for _ in range(4):
    for (x,) in loader:
        with accelerator.accumulate(model), goals.accumulate(last=accelerator.sync_gradients):
            y, mu, logvar, z = model(x)
            apart = covariance_penalty(z, normalize=True, process_group=group)  # of this micro-batch
            out = goals({"recon": (y - x).square().mean(1), "kl": gaussian_kl(mu, logvar), "apart": apart})
            accelerator.backward(out.loss)
            if accelerator.sync_gradients:
                guard.step()
                guard.zero_grad()
accelerator.save_state(folder)
accelerator.print(goals, f"{int(guard.rejected)} steps were rejected", sep="\n")
