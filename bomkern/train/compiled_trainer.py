"""One training step as one graph of torch.compile: networks, statistics, goals, both losses and their backward.

This file defines the networks a second time, in the form that Inductor fuses best. They use the parameters of
`networks` and compute the same values up to rounding:

- Feature maps are [N, H, W, C] and values per channel are [N, C], so that loops over channels are vectorised.
- One convolution of the small image replaces upsampling, replicate padding and 3 x 3 convolution. It has four folded
  kernels per channel, one for each output pixel of a 2 x 2: as many multiplications, a quarter of the bytes.
- Layers that depend on the structure alone run once for all decodes that share it. They are linear up to the first
  norm: with more samples than latents, the images of the latents are convolved, not those of the samples.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from bomkern import GoalOutput

from . import features as see
from . import nine_goals as goal
from .config import Config, TrainError
from .data import Crops
from .networks import SMALLEST, VAE, Block, Decoder, Encoder, Pass
from .trainer import Trainer, raw_values

# Bilinear upsampling to twice the side, then a tap of the kernel: weights [parity, tap, (x[i - 1], x[i], x[i + 1])].
FOLD = (
    ((0.75, 0.25, 0.0), (0.25, 0.75, 0.0), (0.0, 0.75, 0.25)),
    ((0.25, 0.75, 0.0), (0.0, 0.75, 0.25), (0.0, 0.25, 0.75)),
)


class _Replicate(torch.autograd.Function):
    """Repeat the borders, [N, H, W, C] -> [N, H + 2, W + 2, C]. Backward adds slices, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows, columns = (torch.tensor([0, *range(side), side - 1], device=x.device) for side in x.shape[1:3])
        return x[:, rows[:, None], columns]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        h, w = grad.shape[1] - 3, grad.shape[2] - 3
        first, last = F.pad(grad[:, :1], (0, 0, 0, 0, 0, h)), F.pad(grad[:, -1:], (0, 0, 0, 0, h, 0))
        grad = grad[:, 1:-1] + first + last
        first, last = F.pad(grad[:, :, :1], (0, 0, 0, w)), F.pad(grad[:, :, -1:], (0, 0, w, 0))
        return grad[:, :, 1:-1] + first + last


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding).permute(0, 2, 3, 1)


def _single(x: Tensor) -> Tensor:
    """Convert to float32, or keep float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _moments(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Return the mean and the reciprocal deviation of each channel's group; [N, ..., C] -> [N, C] each."""
    variance, mean = torch.var_mean(_single(x), tuple(range(1, x.dim() - 1)), correction=0)
    group = torch.arange(norm.num_channels, device=x.device) // (norm.num_channels // norm.num_groups)
    same = (group[:, None] == group).to(mean.dtype)
    average = same / same.sum(0)  # a matrix product broadcasts the average of a group to its channels
    with torch.autocast(x.device.type, enabled=False):
        middle = mean @ average
        return middle, torch.rsqrt((variance + (mean - middle).square()) @ average + norm.eps)


def encode(encoder: Encoder, image: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `Encoder.forward`. [B, 3, S, S] -> mu, logvar, [B, D] each."""
    x = image.permute(0, 2, 3, 1) * 2 - 1
    layers: list[Any] = list(encoder.trunk)
    for conv, norm in zip(layers[::3], layers[1::3], strict=True):
        x = _conv(x, conv.weight, conv.bias, 2, 1)
        mean, slope = _moments(x, norm)
        slope = slope * norm.weight
        x = F.silu((x - mean[:, None, None]) * slope[:, None, None] + norm.bias)
    mu, logvar = encoder.head(x.permute(0, 3, 1, 2).flatten(1)).chunk(2, dim=1)
    return mu, 8 * torch.tanh(logvar / 8)


def _folded(weight: Tensor) -> Tensor:
    """Fold the upsampling into the kernels, for each parity of row and column. [O, I, 3, 3] -> [4 O, I, 3, 3]."""
    fold = weight.new_tensor(FOLD)
    o, i = weight.shape[:2]
    with torch.autocast(weight.device.type, enabled=False):
        both = torch.einsum("pac,qbd->pqcdab", fold, fold).reshape(36, 9)
        folded = both @ weight.permute(0, 2, 3, 1).reshape(o, 9, i)  # [O, 36, I]
    return folded.view(o, 4, 3, 3, i).transpose(0, 1).reshape(4 * o, 3, 3, i).permute(0, 3, 1, 2)


def _upsampled(block: Block, x: Tensor, bias: Tensor | None) -> Tensor:
    """Upsample and convolve; each 2 x 2 of pixels stays in one dimension. [N, H, W, I] -> [N, H, W, 4, O]."""
    wide: Tensor = _conv(_Replicate.apply(x), _folded(block.conv.weight), bias)
    return cast(Tensor, wide.unflatten(-1, (4, -1)))


def _styled(block: Block, x: Tensor, moments: tuple[Tensor, Tensor], mood: Tensor) -> Tensor:
    """Normalise, scale, shift, apply SiLU and put pixels in place. [N, H, W, 4, O] -> [N, 2 H, 2 W, O]."""
    mean, slope = moments
    scale, shift = (part[:, None, None, None] for part in block.style(mood).chunk(2, dim=1))
    x = F.silu((x - mean[:, None, None, None]) * (slope[:, None, None, None] * (1 + scale)) + shift)
    return cast(Tensor, x.unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2))


def _blocks(decoder: Decoder) -> list[Block]:
    return cast("list[Block]", list(decoder.blocks))


def _fourfold(block: Block) -> Tensor:
    """Repeat a block's bias for the four folded kernels, [4 O]."""
    return cast(Tensor, block.conv.bias).repeat(4)


def _before_first_norm(decoder: Decoder, structure: Tensor) -> Tensor:
    """Compute the input of the first block's norm. [N, structure] -> [N, H, W, 4, O]."""
    start, block = decoder.start, _blocks(decoder)[0]
    bias = _fourfold(block)
    few = structure.shape[1] < len(structure)
    pictures = torch.cat([start.weight.t(), start.bias[None]]) if few else start(structure)
    pictures = pictures.unflatten(1, (-1, SMALLEST, SMALLEST)).permute(0, 2, 3, 1)
    x = _upsampled(block, pictures, None if few else bias)
    if not few:
        return x
    constant = x[-1].flatten(0, 1) + bias.view_as(x[0, 0, 0])  # [H W, 4, O]
    return torch.addmm(constant.flatten(), structure, x[:-1].flatten(1)).view(-1, *x.shape[1:])


def decode(decoder: Decoder, structures: Tensor, appearances: Tensor, which: list[int]) -> list[Tensor]:
    """Compute `Decoder.forward` for several appearances, each with one of the structures.

    Args:
        structures: [s, B, structure].
        appearances: [a, B, appearance].
        which: index of the structure of each appearance.

    Returns:
        a tensors of images, [B, 3, S, S] each.
    """
    first, *others = _blocks(decoder)
    mood = decoder.mood(appearances.flatten(0, 1))
    x = _before_first_norm(decoder, structures.flatten(0, 1))
    by_structure = (part.unflatten(0, (len(structures), -1)) for part in (x, *_moments(x, first.norm)))
    x, *moments = (torch.cat([part[k] for k in which]) for part in by_structure)
    x = _styled(first, x, (moments[0], moments[1]), mood)
    for block in others:
        x = _upsampled(block, x, _fourfold(block))
        x = _styled(block, x, _moments(x, block.norm), mood)
    x = _conv(_Replicate.apply(x), decoder.out.weight, decoder.out.bias)
    images = torch.sigmoid(x + decoder.tint(mood)[:, None, None]).permute(0, 3, 1, 2).contiguous()
    return list(_single(images).chunk(len(which)))


def forward(vae: VAE, image: Tensor, view: Tensor, noise: Tensor, shake: Tensor) -> Pass:
    """Compute `VAE.forward`, with tensors as decodes."""
    mu, logvar = (_single(part) for part in encode(vae.encoder, torch.cat([image, view])))
    views = mu.unflatten(0, (2, len(image)))[..., : vae.parts[0]]
    mu, logvar = mu[: len(image)], logvar[: len(image)]
    z = torch.addcmul(mu, noise, torch.exp(logvar / 2))
    s, a = z.split(vae.parts, dim=1)
    ds, da = shake.split(vae.parts, dim=1)
    images = decode(vae.decoder, torch.stack([s, s + ds]), torch.stack([a, a.roll(-1, 0), a, a + da]), [0, 0, 1, 0])
    return Pass(z, mu, logvar, views, *images)


def losses(
    trainer: Trainer, image: Tensor, noise: Tensor, shake: Tensor, view: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute both losses of a step. The arguments are those of `Trainer.raw`.

    Returns:
        The sum of both losses, whose backward serves both networks. Without gradient: the VAE's loss, its bottleneck
        and record (`GoalOutput`), and the discriminator's loss.
    """
    judge = trainer.discriminator
    with torch.autocast(image.device.type, torch.bfloat16, enabled=trainer.config.precision == "bf16-mixed"):
        out = forward(trainer.vae, image, see.photometric(image, view), noise, shake)
        # The VAE's step needs no gradient of the judge's weights, and the judge's step none of the reconstruction.
        fixed = {name: parameter.detach() for name, parameter in judge.named_parameters()}
        logits = torch.func.functional_call(judge, fixed, (out.recon,))
        recon = cast(Tensor, out.recon).detach()
        real, fake = _single(judge(image)), _single(judge(recon))
    values = raw_values(out, image, logits, order, trainer.trivial, trainer.config.impl)
    output = trainer.goals(dict(zip(goal.GOALS, values, strict=True)))
    judge_loss = (F.softplus(-real) + F.softplus(fake)).mean() / 2
    total = output.loss + judge_loss
    return total, output.loss.detach(), output.bottleneck, output.record, judge_loss.detach()


def compiled(trainer: Trainer) -> Any:
    """Return `losses` of a trainer as one compiled graph; its first call takes a minute or more."""
    return torch.compile(partial(losses, trainer), fullgraph=True, dynamic=False)


class CompiledTrainer(Trainer):
    """A `Trainer` with a compiled step, for one process. The updates and the steps of a probe are not compiled."""

    def __init__(self, config: Config, fabric: Fabric, crops: Crops, total: int | None = None) -> None:
        super().__init__(config, fabric, crops, total)
        self._losses = compiled(self)

    def _walk(self) -> tuple[GoalOutput, Tensor]:
        if self.goals.alone is not None:  # a graph would be compiled for each goal alone
            return super()._walk()
        begun = time.perf_counter()
        try:
            total, loss, bottleneck, record, judge_loss = self._losses(self.images(), *self._noise())
            self.fabric.backward(total)
        except RuntimeError as why:  # compilers raise subclasses of it
            if self.first_seconds:
                raise
            reason = next((line for line in str(why).splitlines() if line.strip()), "")[:200]
            raise TrainError(f"--compile: this step cannot be compiled here ({type(why).__name__}: {reason})") from why
        self.first_seconds = self.first_seconds or time.perf_counter() - begun
        return GoalOutput(loss, bottleneck, record, self.goals.layout), judge_loss
