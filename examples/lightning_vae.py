"""Four goals in PyTorch Lightning: a small VAE on scikit-learn's digits.

python examples/lightning_vae.py --steps 200
python examples/lightning_vae.py --steps 2000 --out runs/lightning  # with a log and a checkpoint
python examples/lightning_vae.py --steps 4000 --out runs/lightning --resume runs/lightning/last.ckpt
"""

import argparse

import pytorch_lightning as pl  # or: import lightning.pytorch as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bomkern import Anchored, GoalSet, covariance_penalty, gaussian_kl
from bomkern.integrations.lightning import GoalCallback

BATCH, LATENTS = 128, 8
IMAGES = torch.tensor(load_digits().images / 16, dtype=torch.float32)[:, None]  # [1797, 1, 8, 8] in [0, 1]
TRAIN, HELD_OUT = IMAGES[:1500], IMAGES[1500:]


def errors(recon: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Return the squared errors of pixels and of differences between neighbours, [B] each."""
    off = recon - x
    return {"recon": off.square().mean(dim=(1, 2, 3)), "edges": off.diff(dim=-1).square().mean(dim=(1, 2, 3))}


class DigitsVAE(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENTS))
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8))
        )
        self.goals = GoalSet(
            recon=Anchored(0.0, "baseline"),  # the error of the trivial answer, set by anchors() before the first step
            edges=Anchored(0.0, "baseline"),
            kl=Anchored(0.0, 25.0),  # nats
            apart=Anchored("floor", LATENTS - 1.0),  # squared correlations of the latents
            spill="auto",
        )

    def anchors(self) -> dict[str, dict[str, float]]:
        """Return the errors of the mean image, and the squared correlations that a batch has by chance alone."""
        trivial = {name: float(error.mean()) for name, error in errors(TRAIN.mean(0), TRAIN).items()}
        return {"baseline": trivial, "floor": {"apart": (LATENTS - 1) / (BATCH - 1)}}

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (x,) = batch
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
        code = {"kl": gaussian_kl(mu, logvar), "apart": covariance_penalty(z, normalize=True)}
        return self.goals({**errors(self.decoder(z), x), **code}).loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        (x,) = batch
        mu, _ = self.encoder(x).chunk(2, dim=1)
        self.log("psnr", -10 * torch.log10(errors(self.decoder(mu), x)["recon"].mean()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", help="folder for a log and a checkpoint; none are written without it")
    parser.add_argument("--resume", help="a checkpoint to go on from")
    args = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    model = DigitsVAE()
    trainer = pl.Trainer(
        max_steps=args.steps,
        accelerator="cpu",
        callbacks=[GoalCallback("goals", log_every=50, anchor=DigitsVAE.anchors)],
        logger=CSVLogger(args.out, name="") if args.out else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train = DataLoader(TensorDataset(TRAIN), batch_size=BATCH, shuffle=True, drop_last=True)
    held_out = DataLoader(TensorDataset(HELD_OUT), batch_size=len(HELD_OUT))
    trainer.fit(model, train, held_out, ckpt_path=args.resume)
    if args.out:
        trainer.save_checkpoint(f"{args.out}/last.ckpt")
    print(model.goals)
    print(f"held-out PSNR {float(trainer.callback_metrics['psnr']):.1f} dB")


if __name__ == "__main__":
    main()
