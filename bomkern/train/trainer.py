"""`Trainer`: networks, optimizers, goals and counters, and a training step that makes no host sync."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor

from bomkern import GoalOutput, GoalSet, Lazy, Spill, StepGuard, latent_statistics, lazy

from . import features as see
from . import nine_goals as goal
from . import processes
from .config import Config
from .counters import Tally
from .data import Crops, to_float
from .networks import VAE, Discriminator, Pass
from .presets import policies

T = TypeVar("T")

CROPS, NOISE, TRIVIAL = 0, 1, 2  # streams of random numbers
TRIVIAL_CROPS = 256
AVERAGE = 0.01  # weight of a step in the moving average of the weights
REJECTED_IN_A_ROW = 50  # training stops after this many rejected steps in a row


def raw_values(
    out: Pass,
    image: Tensor,
    logits: Tensor | Lazy,
    order: Tensor,
    trivial: goal.Trivial,
    impl: str | None = None,
    group: dist.ProcessGroup | None = None,
    by_rows: bool = False,
    lazy: Callable[..., Any] = lazy,
) -> list[Tensor | Lazy]:
    """Compute the nine raw values of a step, each [B], in the order of `nine_goals.NINE`; those of images are lazy.

    Args:
        out: the forward pass.
        image: [B, 3, S, S].
        logits: the discriminator's logits for ``out.recon``.
        order: [B, D] int64, a permutation of the rows for each latent.
        trivial: errors of trivial answers.
        impl: the implementation of the statistics that have kernels.
        group: the ranks that share the batch.
        by_rows: whether total correlation is lazy too, as a row budget needs it; see
            `nine_goals.correlation_above_chance`.
        lazy: makes the lazies.
    """
    recon_edges, swap_edges, moved_edges = (lazy(see.edges, x) for x in (out.recon, out.swap, out.moved_appearance))
    colour, moved_colour = (lazy(see.mean_colour, x) for x in (out.recon, out.moved_structure))
    edges = lazy(see.edges, image)
    code = latent_statistics(out.z, out.mu, out.logvar, process_group=group, impl=impl)
    step = goal.Step(
        *(out, image, logits, order, trivial, impl, group, by_rows, lazy, code),
        *(edges, recon_edges, swap_edges, moved_edges, colour, moved_colour),
    )
    return [each.value(step) for each in goal.NINE]


class Trainer:
    """The state of a run and its training step.

    Every random number is a function of (seed, stream, step), so there is no generator state to save. A resumed run
    draws the numbers that the original run would have drawn, and each rank takes its rows of them.

    Args:
        config: the settings of the run.
        fabric: a launched Fabric.
        crops: training crops.
        total: number of samples per step on all ranks together; None for ``config.batch_size`` on each.

    Attributes:
        vae, discriminator: the networks that are trained.
        average: moving average of the VAE's weights over about 100 steps, which is evaluated and pictured.
        step: number of steps done.
        sharded: whether each rank holds a part of every weight (FSDP2).
        first_seconds: duration of a first step that compiles the others, else 0.
        partial: whether losses may leave parameters out, as those of a probe do. Such parameters then get gradients of
            zeros, which DDP waits for.
    """

    def __init__(self, config: Config, fabric: Fabric, crops: Crops, total: int | None = None) -> None:
        self.config, self.fabric, self.crops = config, fabric, crops
        self.device = fabric.device
        self.total = total or config.batch_size * fabric.world_size
        own = self.total // fabric.world_size
        self._rows = slice(fabric.global_rank * own, (fabric.global_rank + 1) * own)
        self.step, self.partial, self.sharded = 0, False, processes.shards(fabric)
        self.first_seconds = 0.0
        self._walked: list[float] = []  # since the last `window`
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.vae = self._vae()
            self.discriminator = Discriminator(config.width // 2)
        self.average = copy.deepcopy(self.vae).requires_grad_(False).to(self.device)
        self.model, self.judge = fabric.setup_module(self.vae), fabric.setup_module(self.discriminator)
        if self.sharded:
            fabric.setup_module(self.average)
        # Fused, because such a step reads `found_inf` on the device and changes nothing if it is 1.
        self.optimizers = [
            torch.optim.AdamW(self.vae.parameters(), lr=config.lr, fused=True),
            torch.optim.AdamW(
                self.discriminator.parameters(), lr=config.discriminator_lr, betas=(0.5, 0.99), fused=True
            ),
        ]
        self.group = group = dist.group.WORLD if fabric.world_size > 1 else None
        hard = config.temperature == 0 and config.spill_ratio == 0  # each sample gives gradient to one goal alone
        chosen = policies(config.scales, self.total, config.calibration_steps)
        self.goals = GoalSet(
            chosen,
            reduction=config.reduction,
            temperature=config.temperature,
            spill=Spill(config.spill_ratio, budget=config.row_budget, seed=config.seed) if config.spill_ratio else 0.0,
            impl=config.impl,
            # Not "auto", whose choice depends on times: a resumed run must give the same bits. Not on a GPU, where the
            # host would wait for the rows, at a cost that has not been measured.
            route="always" if hard and self.device.type == "cpu" and group is None else "never",
            process_group=group,
        )
        self.goals.to(self.device)
        # `stuck` gives up instead, with the goal that the tally blames.
        self.guard = StepGuard(*self.optimizers, goals=self.goals, process_group=group, limit=None)
        self.tally = Tally(self.device)
        sample = crops.batch(TRIVIAL_CROPS, self._host_rng(TRIVIAL, 0))
        self.trivial = goal.trivial_answers(to_float(sample, self.device))

    def _vae(self) -> VAE:
        config = self.config
        return VAE(config.image_size, config.structure, config.appearance, config.width)

    def _entropy(self, stream: int, step: int) -> list[int]:
        return [self.config.seed, stream, step, 0]

    def _host_rng(self, stream: int, step: int) -> np.random.Generator:
        return np.random.default_rng(self._entropy(stream, step))

    def images(self) -> Tensor:
        """Return the crops of the next step, [B, 3, S, S]."""
        return to_float(self.crops.batch(self.total, self._host_rng(CROPS, self.step), self._rows), self.device)

    def _noise(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return posterior noise [B, D], shake [B, D], view [B, 6] and order [B, D] of the next step."""
        latents = self.config.structure + self.config.appearance
        seed = int(np.random.SeedSequence(self._entropy(NOISE, self.step)).generate_state(1, np.uint32)[0])
        source = torch.Generator(self.device).manual_seed(seed)
        normal = torch.randn(self.total, 2 * latents + 6, generator=source, device=self.device)[self._rows]
        noise, shake, view = normal.split([latents, latents, 6], dim=1)
        order = torch.rand(self.total, latents, generator=source, device=self.device)[self._rows].argsort(0)
        return noise, shake, view, order

    def raw(self) -> tuple[Mapping[str, Tensor | Lazy], Tensor, Tensor | Lazy]:
        """Return the raw values of the next step by goal, its images, and their reconstructions."""
        return self._forward(lambda *results: results)

    def _forward(self, then: Callable[[Mapping[str, Tensor | Lazy], Tensor, Tensor | Lazy], T]) -> T:
        """Return ``then`` of the results of `raw`, called inside of the VAE's forward."""
        image = self.images()
        noise, shake, view, order = self._noise()
        self.discriminator.requires_grad_(False)  # the VAE's step needs no gradient of the discriminator's weights
        by_rows = self.goals.row_budget is not None and self.goals.alone is None

        def rest(out: Pass) -> T:
            with self.fabric.autocast():
                logits = self.lazy(self.discriminator, out.recon)
            with torch.autocast(self.device.type, enabled=False):
                options = self.trivial, self.config.impl, self.group, by_rows, self.lazy
                values = raw_values(out, image, logits, order, *options)
                return then(dict(zip(goal.GOALS, values, strict=True)), image, out.recon)

        return self.networks(image, self.lazy(see.photometric, image, view), noise, shake, rest)

    def networks(
        self, image: Tensor, view: Tensor | Lazy, noise: Tensor, shake: Tensor, then: Callable[[Pass], T]
    ) -> T:
        """Return ``then`` of a forward pass of the VAE; see `VAE.forward`."""
        result: T = self.model(image, view, noise, shake, then)
        return result

    def lazy(self, fn: Callable[..., Tensor], *args: Any) -> Lazy:
        """Return `bomkern.lazy` of a function of rows."""
        return lazy(fn, *args)

    def judge_loss(self, image: Tensor, fakes: Tensor) -> Tensor:
        """Return the discriminator's loss for photographs and reconstructions, which may differ in number, 0-dim."""
        real, fake = self.judge(torch.cat([image, fakes])).float().split([len(image), len(fakes)])
        loss: Tensor = (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
        return loss

    def _walk(self) -> tuple[GoalOutput, Tensor]:
        """Run forward and backward of both networks for the next step; return the discriminator's loss too."""
        out, image, recon = self._forward(lambda raw, image, recon: (self.goals(raw), image, recon))
        loss = out.loss
        if self.partial:
            loss = loss + 0 * torch.stack([p.sum() for p in self.vae.parameters()]).sum()
        self.fabric.backward(loss)

        # All photographs, and the reconstructions that were made for the goals.
        self.discriminator.requires_grad_(True)
        fakes = recon.evaluated[1] if isinstance(recon, Lazy) else recon.detach()
        judge_loss = self.judge_loss(image, fakes)
        self.fabric.backward(judge_loss)
        return out, judge_loss

    def advance(self) -> None:
        """Step the VAE and the discriminator, or neither if anything is not finite."""
        out, judge_loss = self._walk()
        ok = self._apply(out.finite & judge_loss.isfinite())
        bad = ~out["raw"].isfinite()
        bad[goal.GOALS.index("realism")] |= ~judge_loss.isfinite()
        share = out.share
        self.tally.add(ok, share, torch.where(bad.any(), bad, share == share.max()))
        self._walked.append(1.0 if out.walked is None else out.walked)
        self.step += 1

    def stuck(self) -> str | None:
        """Return the goal at fault if too many steps in a row were rejected, else None."""
        return self.tally.blamed() if self.guard.rejected_in_a_row >= REJECTED_IN_A_ROW else None

    @torch.no_grad()
    def remeasure(self, images: Tensor) -> None:
        """Move the anchors of goals with moving anchors, measured on held-out crops [n, 3, S, S]."""
        if self.config.scales == "moving":
            real, flat = (goal.realism(self.discriminator(x).float()) for x in (images, see.flat(images)))
            self.goals.remeasure({"realism": (real, flat)})
            self.goals.drift()  # logs a warning, once

    def window(self) -> dict[str, Any]:
        """Return means over the accepted steps since the last call, read from the device; {} if there was none."""
        parts = self.goals.monitor.take_mean().mean
        if not parts:
            return {}
        names = ("raw", "level", "share", "deficit", "ideal", "scale")
        columns = {name: parts[name].tolist() for name in names}
        goals = {g: {name: columns[name][k] for name in names} for k, g in enumerate(goal.GOALS)}
        walked, self._walked = self._walked, []
        return {"loss": float(parts["loss"]), "walked": sum(walked) / max(1, len(walked)), "goals": goals}

    def _apply(self, finite: Tensor) -> Tensor:
        """Update both networks, or neither. Return whether they were, 0-dim bool on the device, equal on all ranks."""
        ok = self.guard.step(finite)
        self.guard.zero_grad()
        # A rejected step has weight 0. The first steps weigh more, so that the average forgets the untrained weights.
        weight = ok.float() * max(AVERAGE, 1 / (self.step + 1))
        for mean, now in zip(self.average.parameters(), self.vae.parameters(), strict=True):
            processes.local(mean).lerp_(processes.local(now.detach()), weight)
        return ok

    def averaged(self) -> VAE:
        """Return `average` with whole weights. If weights are sharded, all ranks must call it."""
        if not self.sharded:
            return self.average
        with torch.device("meta"):
            vae = self._vae()
        vae.load_state_dict(processes.whole(self.average.state_dict()), assign=True)
        return vae.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a run can resume, in any number of processes after `processes.whole`."""
        return {
            "step": self.step,
            "total": self.total,
            "config": self.config.to_dict(),
            "vae": self.vae.state_dict(),
            "average": self.average.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "goals": self.goals.state_dict(),
            "guard": self.guard.state_dict(),
            "tally": self.tally.state_dict(),
            "trivial": self.trivial._asdict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        for name in ("vae", "average", "discriminator"):
            processes.load_module(getattr(self, name), state[name])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            processes.load_optimizer(optimizer, stored)
        self.goals.load_state_dict(state["goals"])
        self.guard.load_state_dict(state["guard"])
        self.tally.load_state_dict(state["tally"])
        self.trivial = goal.Trivial(**{name: t.to(self.device) for name, t in state["trivial"].items()})
