"""The trainer's nine-goal step, split into networks, statistics, loss and updates, with bomkern and with its peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.loss_section import plain_loss
from bench.machine import DEVICE, timer
from bench.ops.bench_consistency_variance import plain as plain_consistency
from bench.ops.bench_covariance_penalty import plain_batch as plain_covariance
from bench.ops.bench_latent_statistics import plain as plain_statistics
from bench.ops.bench_total_correlation import textbook
from bomkern import LatentStatistics, Lazy, lazy, total_correlation
from bomkern.train import features as see
from bomkern.train import loop
from bomkern.train import nine_goals as goal
from bomkern.train.compiled_trainer import CompiledTrainer
from bomkern.train.config import Config
from bomkern.train.data import Data, load
from bomkern.train.networks import Pass
from bomkern.train.trainer import Trainer, raw_values

SIZE = 64  # pixels
WARM, WARM_BATCH = 40, 32  # steps before the measurement, after which the goals differ as in a real run
RULES = ("weighted sum", "UPGrad", "MGDA")  # other rules, on the same nine losses and statistics as "plain"
BLOCKS = "plain in blocks"
SPILL = "bomkern spill"  # every goal takes all rows
DEFAULT, COMPILED = "bomkern default", "bomkern default compiled"  # spill 1/2 with a budget of rows, as the trainer
DEAREST = "bomkern default, dearest first"  # the same where the order of the goals is the worst one for time
BUDGETED = (DEFAULT, DEAREST, COMPILED)
VARIANTS = ("bomkern lazy", "bomkern routed", "bomkern", SPILL, DEFAULT, DEAREST, COMPILED, "plain", BLOCKS, *RULES)
# Three decodes; two, one of another code; then one. Goals without a decode come last.
BY_COST = ("behavioral_separation", "cross_recon", "reconstruction", "realism", "consistency", "disentanglement")
Estimate = Callable[[Tensor, Tensor, Tensor], Tensor]


def in_blocks(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return total_correlation(z, mu, logvar, impl="reference")


def eager_values(
    out: Pass, image: Tensor, logits: Tensor, order: Tensor, trivial: goal.Trivial, correlation: Estimate = textbook
) -> list[Tensor]:
    """Compute the nine raw values without bomkern. See `bomkern.train.trainer.raw_values`."""
    z, mu, logvar = out.z, out.mu, out.logvar
    edges, recon_edges = see.edges(image), see.edges(out.recon)
    code = LatentStatistics(*plain_statistics(z, mu, logvar))
    shuffled = correlation(z.gather(0, order), mu.gather(0, order), logvar.gather(0, order))
    moved, moved_edges = see.mean_colour(out.moved_structure), see.edges(out.moved_appearance)
    deviation = code.z_variance.clamp(min=1e-12).sqrt()
    dependence = plain_covariance(z / deviation) / (z.shape[1] - 1)
    variance = code.mu_variance[: out.mean.shape[1]].detach().mean().clamp(min=1e-8)
    colour, swap_edges = see.mean_colour(out.recon), see.edges(out.swap)
    eager = {
        "kl_divergence": goal.kl_divergence(code),
        "disentanglement": correlation(z, mu, logvar) - shuffled.mean(),
        "capacity": goal.capacity(code),
        "behavioral_separation": goal.behavioral_separation(colour, moved, recon_edges, moved_edges, trivial),
        "latent_stats": dependence + (1 - deviation).clamp(min=0).mean() + code.logvar_square / 16,
        "reconstruction": goal.reconstruction(out.recon, image, recon_edges, edges, trivial),
        "cross_recon": goal.cross_recon(out.swap, swap_edges, edges, image.roll(-1, 0), trivial),
        "realism": goal.realism(logits),
        "consistency": plain_consistency(out.mean, out.view) / variance,
    }
    more = [one for one in goal.NINE if one.name not in eager]  # a goal that is not written out here is the trainer's
    if more:
        given = (out, image, logits, order, trivial, None, None, False, lazy, code)
        step = goal.Step(*given, edges, recon_edges, swap_edges, moved_edges, colour, moved)
        eager |= {one.name: Lazy.tensors([one.value(step)])[0] for one in more}
    return [eager[name] for name in goal.GOALS]


@functools.lru_cache
def data() -> Data:
    return load(None, SIZE)


class Clock:
    """Measure the seconds of each part, with a device sync at both ends."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = timer()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + timer() - start


class Run(CompiledTrainer):
    """A trainer that repeats the same step, with one batch of images and one draw of noise.

    Args:
        variant: one of `VARIANTS`.
        batch: batch size.
        start: a trainer whose weights to begin with.
    """

    def __init__(self, variant: str, batch: int, start: Trainer | None = None) -> None:
        self.variant = variant
        spill = 0.5 if variant in (SPILL, *BUDGETED) else 0.0
        chosen = Config(image_size=SIZE, batch_size=batch, spill=spill, device=DEVICE)
        if variant == SPILL:
            chosen.budget = 0.0
        super().__init__(chosen, loop.launch(chosen), data().train)
        self.goals.route = "always" if variant in ("bomkern routed", "bomkern lazy") else "never"
        self.anchored = {name: tuple(pair) for name, pair in goal.anchors(batch).items()}
        self.log: dict[str, float] = {}
        for part in ("vae", "average", "discriminator") if start else ():
            getattr(self, part).load_state_dict(getattr(start, part).state_dict())
        self.image, self.draw = super().images(), super()._noise()
        self.parameters = list(self.vae.parameters())

    @property
    def plainly(self) -> bool:
        return self.variant != COMPILED

    def images(self) -> Tensor:
        return self.image

    def _noise(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.draw

    def another(self) -> None:
        """Draw the images and the noise of the next step."""
        self.image, self.draw = super().images(), super()._noise()

    def passes(self) -> tuple[Pass, Tensor | Lazy]:
        """Return the outputs of the networks for the images; those of the lazy variant are not evaluated yet."""
        noise, shake, view, _ = self.draw
        out = self.vae(self.image, lazy(see.photometric, self.image, view), noise, shake)
        self.discriminator.requires_grad_(False)
        if self.variant == "bomkern lazy":
            return out, lazy(self.discriminator, out.recon)
        out = Pass(*Lazy.tensors(out))
        return out, self.discriminator(out.recon)

    def statistics(self, out: Pass, logits: Tensor | Lazy) -> list[Tensor | Lazy]:
        order = self.draw[3]
        if not self.variant.startswith("bomkern"):
            correlation = in_blocks if self.variant == BLOCKS else textbook
            return eager_values(out, self.image, logits, order, self.trivial, correlation)
        raw = raw_values(out, self.image, logits, order, self.trivial)
        return raw if self.variant == "bomkern lazy" else list(Lazy.tensors(raw))

    def loss(self, values: list[Tensor | Lazy]) -> Tensor:
        raw = dict(zip(goal.GOALS, values, strict=True))
        if self.variant.startswith("bomkern"):
            out = self.goals(raw)
            self.finite = out.finite
            return out.loss
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        if self.variant in ("plain", BLOCKS):
            return plain_loss(raw, self.anchored, self.log)
        loss = self.deficits(raw).sum()
        self.log["loss"] = loss.item()
        return loss

    def deficits(self, raw: dict[str, Tensor]) -> Tensor:
        """Return the mean deficits over the batch, [K]."""
        return torch.stack([((raw[n] - ideal) / (nadir - ideal)).mean() for n, (ideal, nadir) in self.anchored.items()])

    def backward(self) -> Tensor | Lazy | None:
        """Compute the gradients of the VAE. Return the reconstructions, or None if the judge has its gradients too."""
        if self.variant in BUDGETED:
            out, judged = self._walk()
            self.finite = out.finite & judged.isfinite()
            return None
        out, logits = self.passes()
        values = self.statistics(out, logits)
        if self.variant in ("UPGrad", "MGDA"):
            self._descend(self.deficits(dict(zip(goal.GOALS, values, strict=True))))
        else:
            self.loss(values).backward()
        return out.recon

    def _order(self, first: tuple[str, ...]) -> None:
        """Give the goals the weights of an order, whatever their deficits are."""
        order = [*first, *(name for name in goal.GOALS if name not in first)]
        weights = dict(zip(order, self.goals.get_buffer("_weights_by_order").tolist(), strict=True))
        self.goals.multipliers.copy_(torch.tensor([weights[name] for name in goal.GOALS]))

    def _descend(self, losses: Tensor) -> None:
        from torchjd import aggregation
        from torchjd.autojac import backward, jac_to_grad

        self.finite = losses.isfinite().all()
        backward(list(losses), inputs=self.parameters, parallel_chunk_size=1)
        jac_to_grad(self.parameters, getattr(aggregation, self.variant)())

    def update(self, recon: Tensor | Lazy | None) -> None:
        """Run the discriminator's backward, unless `backward` has, and both optimisers."""
        if recon is None:
            self._apply(self.finite)
            return
        self.discriminator.requires_grad_(True)
        judged = self.judge_loss(self.image, recon.value if isinstance(recon, Lazy) else recon.detach())
        judged.backward()
        self._apply(self.finite & judged.isfinite())

    def whole(self) -> None:
        """Take one step."""
        if self.variant == DEAREST:
            self._order(BY_COST)
        self.update(self.backward())
        self.step += 1

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of the VAE's parameters without taking the step."""
        self.backward()
        grads = [p.grad for p in self.parameters]
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return grads

    def in_parts(self, clock: Callable[[str], Any]) -> None:
        """Take one step with the graph cut between the parts, so that each part's backward can be timed too."""
        with clock("networks"):
            out, logits = self.passes()
        cut = [x.detach().requires_grad_() for x in (*out, logits)]
        with clock("statistics"):
            values = self.statistics(Pass(*cut[:-1]), cut[-1])
        raw = [x.detach().requires_grad_() for x in values]
        with clock("loss"):
            self.loss(raw).backward()
        with clock("statistics"):
            _onward(values, raw)
        with clock("networks"):
            _onward([*out, logits], cut)
        with clock("updates"):
            self.update(out.recon)
        self.step += 1


def _onward(tensors: list[Tensor], leaves: list[Tensor]) -> None:
    """Continue backward from the tensors at a cut, along the branches whose leaves got a gradient."""
    reached = [(x, leaf.grad) for x, leaf in zip(tensors, leaves, strict=True) if leaf.grad is not None]
    torch.autograd.backward(*map(list, zip(*reached, strict=True)))


@functools.lru_cache
def started() -> Run:
    """Return a trainer after the first `WARM` steps."""
    run = Run("bomkern lazy", WARM_BATCH)
    for _ in range(WARM):
        run.another()
        run.whole()
    return run
