"""Fuzz the statistics of a latent code."""

from __future__ import annotations

from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor

import bomkern
from bomkern import LatentStatistics
from tests.fuzz.cases import Case, alike, size, tensor
from tests.fuzz.ops import Drawn, Errors, Op, Outputs


def matrix_sizes(source: Random, tiny: bool, elements: int = 60_000) -> dict[str, int]:
    """Draw B and D with at most ``elements`` elements, rarely thirty times as many."""
    if tiny:
        return {"B": size(source, 9), "D": size(source, 7)}
    most = elements * (30 if source.random() < 0.01 else 1)
    first = size(source, 2050)
    second = size(source, min(2050, max(1, most // max(1, first))))
    batch, dims = (first, second) if source.random() < 0.5 else (second, first)
    return {"B": batch, "D": dims}


class GaussianKL(Op):
    name = "gaussian_kl"
    needs: ClassVar = {"B": 1, "D": 1}
    spoiled = (("rho", 1.0), ("rho", float("nan")), ("block_size", 0), ("rho", "0.5"))
    per_sample = True

    def draw(self, source: Random, tiny: bool) -> Drawn:
        sizes = matrix_sizes(source, tiny)
        given = [tensor(source, "mu", "BD", "code"), tensor(source, "logvar", "BD", "logvar")]
        options: dict[str, Any] = {}
        if source.random() < 0.5:
            block = source.choice([1, 2, 3, 4, 7, 16, 100])
            sizes["D"] = max(sizes["D"], block)
            if source.random() < 0.5:  # whole blocks; otherwise the last block is mostly shorter
                sizes["D"] -= sizes["D"] % block
            least = -1 / (block - 1) if block > 1 else -1.0
            options = {
                "block_size": block,
                "rho": round(least + source.choice([0.02, 0.3, 0.6, 0.98]) * (1 - least), 6),
            }
        return sizes, alike(source, given), options

    def refuses(self, case: Case) -> Errors:
        block, rho = case.options.get("block_size"), case.options.get("rho", 0.0)
        errors = super().refuses(case)
        if isinstance(block, int) and not 1 <= block <= case.sizes["D"]:
            errors += (ValueError,)
        least = -1 / (block - 1) if isinstance(block, int) and block > 1 else -float("inf")
        if not isinstance(rho, (int, float)) or not least < rho < 1 or (block is None and rho != 0):
            errors += (ValueError, TypeError)
        return errors

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        mu, logvar = tensors
        return {"value": bomkern.gaussian_kl(mu, logvar, **case.options, impl=impl)}

    def units(self, case: Case, tensors: list[Tensor], outputs: Outputs) -> dict[str, float]:
        # Terms cancel near the prior and within a block. Each term is divided by the prior's smallest variance.
        mu, logvar = (torch.where(x.isfinite(), x, 0) for x in tensors)
        block, rho = case.options.get("block_size") or 1, case.options.get("rho", 0.0)
        stiff = 1 / min(1 - rho, 1 - rho + block * rho)
        tame = logvar.clamp(max=80)  # the variance continues as a tangent
        terms = mu.square() * stiff + (tame.exp() * (1 + logvar - tame) + 1) * stiff + logvar.abs() + 1
        return {
            "value": terms.sum(1).max().item(),
            "grad mu": stiff * mu.abs().max().item(),
            "grad logvar": stiff * (1 + tame.exp().max().item()),
        }


class ConsistencyVariance(Op):
    name = "consistency_variance"
    needs: ClassVar = {"B": 1, "D": 1}
    spoiled = (("correction", -1), ("correction", 17), ("correction", float("nan")), ("detach", 1))
    per_sample = True

    def draw(self, source: Random, tiny: bool) -> Drawn:
        sizes, count = matrix_sizes(source, tiny, 30_000), source.choice([2, 2, 3, 4, 5, 8, 15, 16])
        count = source.choice([0, 1, 17]) if source.random() < 0.02 else count
        if source.random() < 0.4:
            sizes["V"] = count
            given = [tensor(source, "views", "VBD", "code")]
        else:
            given = alike(source, [tensor(source, f"view{k}", "BD", "code") for k in range(count)])
        options: dict[str, Any] = {"correction": source.choice([0, 1, 1, 0.5, max(count, 2) - 1])}
        if source.random() < 0.2:
            options["detach"] = True
        return sizes, given, options

    def refuses(self, case: Case) -> Errors:
        count = case.sizes.get("V", len(case.given))
        errors = super().refuses(case)
        correction = case.options.get("correction", 1)
        if not 2 <= count <= 16 or not isinstance(correction, (int, float)) or not 0 <= correction < count:
            errors += (ValueError, TypeError)
        return errors

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        views = tensors[0] if "V" in case.sizes else tensors
        return {"value": bomkern.consistency_variance(views, **case.options, impl=impl)}

    def overflows(self, case: Case, tensors: list[Tensor], name: str) -> bool:
        """Return whether the sum of squares over views and columns overflows, of which the variance is the mean."""
        views = [x.nan_to_num(0, 0, 0) for x in (tensors[0] if "V" in case.sizes else tensors)]
        squares = sum((x - views[0]).square().sum(1).max().item() for x in views)
        return name == "value" and squares > torch.finfo(torch.float64 if case.wide else torch.float32).max

    def units(self, case: Case, tensors: list[Tensor], outputs: Outputs) -> dict[str, float]:
        # A view near the mean keeps the rounding error of views far from it.
        count, correction = case.sizes.get("V", len(case.given)), case.options.get("correction", 1)
        x = tensors[0] if "V" in case.sizes else torch.stack(tensors)
        apart = (x - x.mean(0)).nan_to_num(0, 0, 0).abs().max().item()
        return {f"grad {g.name}": 4 * apart / (count - correction) / case.sizes["D"] for g in case.given}

    def slack_of(self, case: Case, tensors: list[Tensor]) -> float:
        # Sums are relative to the first view. If that is an outlier, all but one part in V cancels.
        return 1e-6 * (1 + case.sizes.get("V", len(case.given)) / 4)


def units_slack(case: Case) -> float:
    """Return the slack: near the threshold, 1 / temperature multiplies a variance's rounding error."""
    threshold, temperature = case.options.get("threshold", 0.1), case.options.get("temperature", 0.05)
    return 1e-6 + 1e-7 * max(1.0, abs(threshold)) / temperature


def units_gradient(mu: Tensor) -> float:
    """Return the scale of the gradient's rounding error.

    If columns vary alike, the effective fraction is at its maximum, and only rounding is left.
    """
    mu = torch.where(mu.isfinite(), mu, 0)
    mu = mu - mu.mean(0)
    total = mu.var(0).sum().item()
    return 0.0 if total == 0 else 10 * mu.abs().max().item() / (len(mu) - 1) / total


class ActiveUnits(Op):
    name = "active_units"
    needs: ClassVar = {"B": 2, "D": 1}
    spoiled = (("temperature", 0.0), ("temperature", -1.0), ("threshold", float("nan")), ("threshold", float("inf")))

    def draw(self, source: Random, tiny: bool) -> Drawn:
        options = {}
        if source.random() < 0.5:
            options = {
                "threshold": source.choice([0.0, 0.01, 0.1, 1.0, -0.5, 500.0]),
                "temperature": source.choice([1e-3, 0.05, 0.3, 2.0, 200.0]),
            }
        return matrix_sizes(source, tiny), [tensor(source, "mu", "BD", "code")], options

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        return dict(
            zip(("active", "effective"), bomkern.active_units(*tensors, **case.options, impl=impl), strict=True)
        )

    def slack_of(self, case: Case, tensors: list[Tensor]) -> float:
        return units_slack(case)

    def units(self, case: Case, tensors: list[Tensor], outputs: Outputs) -> dict[str, float]:
        return {"grad mu": units_gradient(tensors[0])}


class Latent(Op):
    name = "latent_statistics"
    needs: ClassVar = {"B": 2, "D": 1}
    spoiled = ActiveUnits.spoiled

    def draw(self, source: Random, tiny: bool) -> Drawn:
        sizes, _, options = ActiveUnits().draw(source, tiny)
        roles = {"z": "code", "mu": "code", "logvar": "logvar"}
        given = alike(source, [tensor(source, name, "BD", role) for name, role in roles.items()])
        if source.random() < 0.5:  # one field alone, whose gradients the others' would hide
            options["fields"] = sorted(source.sample(LatentStatistics._fields, source.choice([1, 1, 2, 4])))
        return sizes, given, options

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        options = dict(case.options)
        fields = options.pop("fields", None)
        found = bomkern.latent_statistics(*tensors, **options, impl=impl)._asdict()
        return {name: x if fields is None or name in fields else x.detach() for name, x in found.items()}

    def slack_of(self, case: Case, tensors: list[Tensor]) -> float:
        return units_slack(case)

    def units(self, case: Case, tensors: list[Tensor], outputs: Outputs) -> dict[str, float]:
        kl = GaussianKL().units(case, tensors[1:], outputs)
        mu = max(kl["grad mu"], units_gradient(tensors[1])) if case.options.get("fields") is None else 0.0
        z_size, mu_size, logvar_size = (x.nan_to_num(0, 0, 0).abs() for x in tensors)
        return {
            "kl": kl["value"],
            "logvar_mean": logvar_size.mean(1).max().item(),
            # Each block of rows subtracts its first value. An outlier there leaves large numbers.
            "z_mean": z_size.max().item(),
            "mu_mean": mu_size.max().item(),
            "grad mu": mu or units_gradient(tensors[1]),
            "grad logvar": kl["grad logvar"],
        }


class CovariancePenalty(Op):
    name = "covariance_penalty"
    needs: ClassVar = {"B": 2, "D": 1}
    spoiled = (("normalize", 1), ("reduction", "mean"), ("reduction", None))
    slack = 4e-6

    def draw(self, source: Random, tiny: bool) -> Drawn:
        options = {"normalize": source.random() < 0.5, "reduction": source.choice(["sample", "batch"])}
        return matrix_sizes(source, tiny), [tensor(source, "z", "BD", "code")], options

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        return {"value": bomkern.covariance_penalty(*tensors, **case.options, impl=impl)}

    def units(self, case: Case, tensors: list[Tensor], outputs: Outputs) -> dict[str, float]:
        # With D > B the diagonal is added and subtracted again. Two samples correlate by 1, so everything cancels.
        x = torch.where(tensors[0].isfinite(), tensors[0], 0)
        x = x - x.mean(0)
        (batch, dims), deviation = x.shape, x.std(0)
        inverse = torch.where(deviation > 0, 1 / deviation, 0) if case.options.get("normalize") else deviation**0
        x = x * inverse
        c, k = x.T @ x / (batch - 1), batch / (batch - 1)
        off = c if dims > batch else c - torch.diag(c.diagonal())
        each = k / dims * ((x @ off).abs() * x.abs()).sum(1)
        pull = 2.0 if case.options.get("reduction", "sample") == "sample" else 2.0 / batch
        gradient = 2 * k / dims * (x @ c).abs().max() * inverse.max() * pull
        return {"value": each.max().item(), "grad z": gradient.item()}


OPS: tuple[Op, ...] = (GaussianKL(), ConsistencyVariance(), ActiveUnits(), Latent(), CovariancePenalty())
