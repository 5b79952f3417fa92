"""Plot estimates of total correlation against the exact value as the batch grows, for Gaussian latents.

python -m bench.convergence_total_correlation --out bench/results/total_correlation_convergence.png
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bomkern import gaussian_total_correlation, total_correlation

# So large that the mixture of the data set's posteriors is the distribution itself, whose value is known exactly.
DATASET_SIZE = 1_000_000
SIZES = tuple(2**k for k in range(5, 13))
REPEATS = {batch: max(8, min(32, 16384 // batch)) for batch in SIZES}


class Gaussians(NamedTuple):
    """Latents with a known aggregate posterior: ``mu ~ N(0, S)`` and ``z ~ N(mu, v I)`` give ``z ~ N(0, S + v I)``.

    S has ones on its diagonal and ``correlation`` everywhere else; v is ``variance``.
    """

    dims: int
    correlation: float
    variance: float

    def covariance_of_means(self) -> Tensor:
        """Return S, [D, D] float64."""
        ones = torch.ones(self.dims, self.dims, dtype=torch.float64)
        return self.correlation * ones + (1 - self.correlation) * torch.eye(self.dims, dtype=torch.float64)

    def covariance(self) -> Tensor:
        """Return S + v I, [D, D] float64."""
        return self.covariance_of_means() + self.variance * torch.eye(self.dims, dtype=torch.float64)

    def exact(self) -> float:
        """Return ``(sum_d log C_dd - log det C) / 2`` nats, where C is the covariance of z."""
        c = self.covariance()
        return float(c.diagonal().log().sum() - c.logdet()) / 2

    def information(self) -> tuple[float, float]:
        """Return the chi-squared information between z and its component, for all latents together and for one.

        For a component N(mu, v I) of N(0, C), the mean over components of ``int N(z; mu, v I)^2 / N(z; 0, C) dz`` is
        ``det C / v^D``, and the information is 1 less.
        """
        c = self.covariance()
        together = math.expm1(float(c.logdet()) - self.dims * math.log(self.variance))
        return together, float(c[0, 0]) / self.variance - 1

    def draw(self, batch: int, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw z, mu and logvar of a batch, [B, D] float32."""
        root = torch.linalg.cholesky(self.covariance_of_means()).float()
        mu = torch.randn(batch, self.dims, generator=source) @ root.T
        z = mu + math.sqrt(self.variance) * torch.randn(batch, self.dims, generator=source)
        return z, mu, torch.full_like(mu, math.log(self.variance))


Estimate = Callable[[Tensor, Tensor, Tensor], Tensor]
ESTIMATES: dict[str, Estimate] = {
    "plain 1/B": lambda z, mu, logvar: total_correlation(z, mu, logvar).mean(),
    "MSS": lambda z, mu, logvar: total_correlation(z, mu, logvar, DATASET_SIZE, "mss").mean(),
    "gaussian_total_correlation(z)": lambda z, mu, logvar: gaussian_total_correlation(z),
}
SETTINGS = (Gaussians(2, 0.9, 0.25), Gaussians(6, 0.6, 0.5), Gaussians(10, 0.5, 0.25))


def estimates(setting: Gaussians, batch: int, repeats: int, seed: int = 0) -> dict[str, Tensor]:
    """Return each estimate's batch mean for ``repeats`` batches: name -> [repeats] nats."""
    source = torch.Generator().manual_seed(seed)
    draws = [setting.draw(batch, source) for _ in range(repeats)]
    return {name: torch.stack([estimate(*x) for x in draws]).double() for name, estimate in ESTIMATES.items()}


def picture(path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SETTINGS), figsize=(13, 4.6), layout="constrained")
    for axis, setting in zip(axes, SETTINGS, strict=True):
        by_size = [estimates(setting, batch, REPEATS[batch], seed=batch) for batch in SIZES]
        axis.axhline(setting.exact(), color="black", linestyle="--", label="exact")
        for name, marker in zip(ESTIMATES, "osD", strict=True):
            mean = torch.stack([each[name].mean() for each in by_size])
            spread = torch.stack([each[name].std() for each in by_size])
            (line,) = axis.plot(SIZES, mean, marker=marker, markersize=4, label=name)
            axis.fill_between(SIZES, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, [str(batch) for batch in SIZES])
        axis.set_xlabel("batch size B (samples)")
        axis.set_title(
            f"D = {setting.dims}, means correlated {setting.correlation}, posterior variance {setting.variance}",
            fontsize="medium",
        )
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("total correlation (nats)")
    axes[0].legend()
    figure.suptitle(
        f"Total correlation of Gaussian latents: mean and standard deviation of {min(REPEATS.values())} to "
        f"{max(REPEATS.values())} batches, MSS with N = {DATASET_SIZE:,}"
    )
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results/total_correlation_convergence.png", help="the PNG to write")
    picture(parser.parse_args().out)


if __name__ == "__main__":
    main()
