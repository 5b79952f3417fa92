"""Fuzz total correlation, of a whole batch or some of its rows, and the Gaussian estimate."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor

from bomkern import gaussian_total_correlation, reference, total_correlation
from bomkern.dispatch import select
from tests.fuzz.cases import Case, alike, size, tensor
from tests.fuzz.ops import Drawn, Errors, Op, Outputs
from tests.fuzz.statistics import matrix_sizes


class TotalCorrelation(Op):
    """Fuzz total_correlation; with ``first`` in the options z holds the R rows of one rank, with ``parts`` log q."""

    name = "total_correlation"
    needs: ClassVar = {"B": 1, "D": 1, "R": 1}
    slack = 2e-6
    spoiled = (("estimator", "mcs"), ("dataset_size", True), ("dataset_size", 0), ("dataset_size", 2.5))

    def draw(self, source: Random, tiny: bool) -> Drawn:
        if tiny:
            sizes = {"B": size(source, 7), "D": size(source, 3)}
        else:
            most = 20_000_000 if source.random() < 0.005 else 300_000
            batch = size(source, 1031)
            sizes = {"B": batch, "D": size(source, max(1, min(1031, most // max(1, batch) ** 2)))}
        batch = sizes["B"]
        given = [tensor(source, name, "BD", "code", tame=True) for name in ("z", "mu")]
        given = alike(source, [*given, tensor(source, "logvar", "BD", "logvar", tame=True)])
        options: dict[str, Any] = {}
        if source.random() < 0.7:
            options["dataset_size"] = max(1, source.choice([batch, batch + 1, 2 * batch, 5000, 10**9]))
            if options["dataset_size"] >= batch >= 2:
                options["estimator"] = source.choice(["mws", "mss", "mss"])
        if batch and source.random() < 0.3:
            sizes["R"] = source.randint(1, batch)
            options["first"] = source.randint(0, batch - sizes["R"])
            given[0] = replace(given[0], axes="RD")
        if source.random() < 0.3:
            options["parts"] = True
        return sizes, given, options

    def refuses(self, case: Case) -> Errors:
        errors, batch, options = super().refuses(case), case.sizes["B"], case.options
        known, stratified = options.get("dataset_size"), options.get("estimator") == "mss"
        if (known is not None and known < batch) or (stratified and (batch < 2 or known is None)):
            errors += (ValueError,)
        if "first" in options and not 0 <= options["first"] <= batch - case.sizes["R"]:
            errors += (ValueError,)
        return errors

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        options = dict(case.options)
        if "first" not in options and "parts" not in options:
            return {"value": total_correlation(*tensors, **options, impl=impl)}
        serve = select.resolve("total_correlation", tensors[0].device.type, impl)
        stratified = options.get("estimator", "mws") == "mss"
        arguments = *tensors, options.get("dataset_size"), stratified, options.get("first")
        if "parts" not in options:
            return {"value": serve(*arguments)}
        value, log_q = serve(*arguments, parts=True)
        return {"value": value, "log_q": log_q}

    def dtype_of(self, case: Case, name: str) -> torch.dtype:
        return torch.float64 if name == "log_q" else super().dtype_of(case, name)

    def spoil(self, source: Random, drawn: Drawn) -> Drawn:
        return drawn if drawn[2].keys() & {"first", "parts"} else super().spoil(source, drawn)

    def smaller(self, case: Case) -> list[Case]:
        if "parts" in case.options:
            return [replace(case, options={k: v for k, v in case.options.items() if k != "parts"})]
        if "first" not in case.options:
            return []
        sizes = {name: n for name, n in case.sizes.items() if name != "R"}
        whole = (replace(case.given[0], axes="BD"), *case.given[1:])
        options = {name: value for name, value in case.options.items() if name != "first"}
        return [replace(case, sizes=sizes, given=whole, options=options), case.with_options(first=0)]

    def units(self, case: Case, tensors: list[Tensor], outputs: Outputs) -> dict[str, float]:
        """Return the sums of the terms' magnitudes: logarithms for a value, weights for a gradient."""
        z, mu, logvar = (torch.where(x.isfinite(), x, 0) for x in tensors)
        names, values = [f"grad {g.name}" for g in case.given], outputs.keys() & {"value", "log_q"}
        if len(z) * mu.numel() > 2_000_000:
            sizes = {name: 1 + outputs[name].nan_to_num(0, 0, 0).abs().max().item() for name in values}
            return {**sizes, **{name: outputs[name].abs().max().item() for name in names if name in outputs}}
        rows = torch.arange(len(z)) + case.options.get("first", 0)
        stratified = case.options.get("estimator", "mws") == "mss"
        weights = reference.log_weights(rows, len(mu), case.options.get("dataset_size"), stratified)
        each = reference.log_density(z, mu, logvar)
        joint, marginal = each.sum(2) + weights, each + weights[:, :, None]
        size = joint.logsumexp(1).abs() + marginal.logsumexp(1).abs().sum(1)
        # The CPU takes a weight below 2^-63.5 as 0, which is 2^-44 of the slack.
        parts = len(values) * joint.softmax(1)[:, :, None] + marginal.softmax(1) + 2.0**-44
        pull = (z[:, None] - mu).abs() * (-logvar).exp()
        shift, stretch = 2 * parts * pull, parts * (pull * (z[:, None] - mu).abs() + 1)
        # A component's weight is an exponential. Its relative error grows with its exponent until no digit is left.
        exponent = each.abs().sum(2).amin(1).max().item() * (0.02 if case.wide else 0.3)
        unsure = max(1.0, exponent) if exponent < 1e5 else torch.inf
        sums = (shift.sum(1), shift.sum(0), stretch.sum(0))
        # Equal terms have equal rounding errors, so an average does not reduce them.
        return {
            **dict.fromkeys(values, 2 + 2 * size.max().item()),
            **{n: x.max().item() * unsure for n, x in zip(names, sums, strict=True)},
        }


class GaussianTotalCorrelation(Op):
    """Fuzz gaussian_total_correlation, in plain PyTorch, against the determinant of the correlation matrix."""

    name = "gaussian_total_correlation"
    needs: ClassVar = {"B": 1, "D": 1}

    def serves(self, impl: str, device: str) -> bool:
        return impl == "reference"

    def draw(self, source: Random, tiny: bool) -> Drawn:
        sizes = matrix_sizes(source, tiny)
        low, high = sorted(sizes.values())
        sizes = {"B": high, "D": min(low, 128)} if source.random() < 0.97 else {"B": low, "D": high}
        z = tensor(source, "z", "BD", "code")
        if z.values == "denormal":  # a gradient in units of 1/z exceeds float32's largest number
            z = replace(z, values="tiny")
        return sizes, [z], {}

    def refuses(self, case: Case) -> Errors:
        errors = super().refuses(case)
        return errors if case.sizes["B"] > case.sizes["D"] else (*errors, ValueError)

    def call(self, case: Case, tensors: list[Tensor], impl: str, narrow: bool) -> Outputs:
        return {"value": gaussian_total_correlation(*tensors)}

    def correlation(self, z: Tensor) -> Tensor:
        x = z - z[:1]
        x = x - x.mean(0)
        x = x / x.detach().abs().amax(0)
        c = x.T @ x
        inverse = c.diagonal().rsqrt()
        return c * inverse * inverse[:, None]

    def exact(self, case: Case, tensors: list[Tensor], narrow: bool) -> Outputs:
        if tensors[0].dtype == torch.float32:
            return self.call(case, tensors, "reference", narrow)
        z = tensors[0]
        if not z.isfinite().all():
            return {"value": (z * torch.nan).sum()}
        if (z == z[0]).all(0).any() or self.condition(case, z) < 1e-12:
            return {"value": z.new_full((), torch.inf)}
        return {"value": -0.5 * torch.logdet(self.correlation(z))}

    def condition(self, case: Case, z: Tensor) -> float:
        """Return the least eigenvalue, a bound for the variance of a column that the others do not explain."""
        c = self.correlation(z.detach().double())
        return max(0.0, torch.linalg.eigvalsh(c)[0].item()) if c.isfinite().all() else 0.0

    def overflows(self, case: Case, tensors: list[Tensor], name: str) -> bool:
        """Return whether a column's unexplained variance is near the rounding at which it counts as a copy."""
        eps = torch.finfo(torch.float64 if case.wide else torch.float32).eps
        return bool(tensors[0].isfinite().all()) and self.condition(case, tensors[0]) < 64 * eps

    def slack_of(self, case: Case, tensors: list[Tensor]) -> float:
        z = tensors[0]
        if not z.isfinite().all() or (z == z[0]).all(0).any():
            return self.slack
        # Nearly dependent columns have an error of 1 / unexplained variance. Rounding far from 0 hides that variance.
        left = max(self.condition(case, z), 1e-30)
        far = (z.mean(0).abs() / z.std(0)).max().item()
        return 1e-6 * (1 + len(z) ** 0.5) * (1 + 1 / left) * (1 + far)

    def units(self, case: Case, tensors: list[Tensor], outputs: Outputs) -> dict[str, float]:
        z = tensors[0]
        size = z.abs().amax(0)
        spread = (z / torch.where(size > 0, size, 1)).std(0) * size  # squares of values near 1e160 would overflow
        return {"value": 1.0, "grad z": 1 / max(1e-30, spread.min().nan_to_num(1.0).item())}


OPS: tuple[Op, ...] = (TotalCorrelation(), GaussianTotalCorrelation())
