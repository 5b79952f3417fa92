"""The trainer with its networks and the goals of images compiled by torch.compile, for row counts that vary.

Each function of rows is one compiled graph with a symbolic number of rows, so that a row budget recompiles nothing. The
statistics of the code are bomkern's kernels, which need no compiler. This file defines the networks a second time, in
the form that Inductor fuses best. They use the parameters of `networks` and compute the same values up to rounding:

- Feature maps are [N, H, W, C] and values per channel are [N, C], so that loops over channels are vectorised.
- One convolution of the small image replaces upsampling, replicate padding and 3 x 3 convolution. It has four folded
  kernels per channel, one for each output pixel of a 2 x 2: as many multiplications, a quarter of the bytes.
- The decoder is linear in the structure up to its first norm, so the images of the latents are convolved, not those of
  the samples.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from bomkern import GoalOutput, Lazy, lazy
from bomkern.common.torch_internals import mark_rows_dynamic

from . import features as see
from . import nine_goals as goal
from .config import Config, TrainError
from .data import Crops
from .networks import SMALLEST, Block, Decoder, Discriminator, Encoder, Pass, pass_of
from .trainer import Trainer

T = TypeVar("T")

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
    pictures = torch.cat([start.weight.t(), start.bias[None]])
    pictures = pictures.unflatten(1, (-1, SMALLEST, SMALLEST)).permute(0, 2, 3, 1)
    x = _upsampled(block, pictures, None)
    constant = x[-1].flatten(0, 1) + _fourfold(block).view_as(x[0, 0, 0])  # [H W, 4, O]
    return torch.addmm(constant.flatten(), structure, x[:-1].flatten(1)).view(-1, *x.shape[1:])


def decode(decoder: Decoder, structure: Tensor, appearance: Tensor) -> Tensor:
    """Compute `Decoder.forward`. [N, structure] and [N, appearance] -> [N, 3, S, S]."""
    first, *others = _blocks(decoder)
    mood = decoder.mood(appearance)
    x = _before_first_norm(decoder, structure)
    x = _styled(first, x, _moments(x, first.norm), mood)
    for block in others:
        x = _upsampled(block, x, _fourfold(block))
        x = _styled(block, x, _moments(x, block.norm), mood)
    x = _conv(_Replicate.apply(x), decoder.out.weight, decoder.out.bias)
    return _single(torch.sigmoid(x + decoder.tint(mood)[:, None, None]).permute(0, 3, 1, 2).contiguous())


def structure_of(encoder: Encoder, latents: int, image: Tensor) -> Tensor:
    """Compute `VAE.structure`. [N, 3, S, S] -> [N, latents]."""
    return _single(encode(encoder, image)[0])[:, :latents]


def logits_of(judge: Discriminator, image: Tensor) -> Tensor:
    """Compute `Discriminator.forward` without gradient for its weights."""
    fixed = {name: parameter.detach() for name, parameter in judge.named_parameters()}
    logits: Tensor = torch.func.functional_call(judge, fixed, (image,))
    return logits


def judge_loss(judge: Discriminator, image: Tensor, fakes: Tensor) -> Tensor:
    """Compute `Trainer.judge_loss`."""
    real, fake = _single(judge(image)), _single(judge(fakes))
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def is_rows(argument: object) -> TypeGuard[Tensor]:
    return isinstance(argument, Tensor) and argument.dim() > 0


def _compile(fn: Callable[..., Any], *first: Any) -> Any:
    """Return the compiled function of the other arguments. Its graphs are its own.

    torch.compile keeps graphs with a code object, at most eight, which other trainers of this process would share.
    Beyond eight, calls of other shapes are not compiled.
    """

    def call(*args: Any) -> Any:
        return fn(*first, *args)

    name = getattr(fn, "__name__", type(fn).__name__)
    own = types.FunctionType(call.__code__.replace(co_name=name), call.__globals__, name, None, call.__closure__)
    return torch.compile(own)


class Compiled:
    """A function of rows, compiled for any number of them.

    Args:
        fn: a row of its result depends on that row of the other arguments alone.
        first: its first arguments, which are no rows.
    """

    independent_rows = True  # a check of `bomkern.lazy` would compile a graph without gradient too

    def __init__(self, fn: Callable[..., Any], *first: Any) -> None:
        self._fn = _compile(fn, *first)

    def __call__(self, *args: Any) -> Any:
        rows = next(len(a) for a in args if is_rows(a))
        return self._fn(*map(_for_any_rows, args))[:rows]


def _for_any_rows(argument: Any) -> Any:
    """Return rows as a compiled function takes them: contiguous, no view, and a symbolic number of at least 2.

    torch.compile would compile further graphs for other strides, for views of larger tensors, and for a single row.
    """
    if not is_rows(argument):
        return argument
    rows = torch.cat([argument, argument]) if len(argument) == 1 else argument
    rows = rows.clone(memory_format=torch.contiguous_format)
    mark_rows_dynamic(rows)
    return rows


class CompiledTrainer(Trainer):
    """A `Trainer` whose networks and goals of images are compiled, for one process.

    The updates and the steps of a probe are not compiled.
    """

    def __init__(self, config: Config, fabric: Fabric, crops: Crops, total: int | None = None) -> None:
        super().__init__(config, fabric, crops, total)
        self.goals.route = "never"  # the evaluation of all rows without a graph would be compiled too
        vae, judge = self.vae, self.discriminator
        self._encode = _compile(encode, vae.encoder)
        self._decode = Compiled(decode, vae.decoder)
        self._structure = Compiled(structure_of, vae.encoder, vae.parts[0])
        self._judge_loss = _compile(judge_loss, judge)
        fused = (see.photometric, see.edges, see.mean_colour, *goal.OF_IMAGES)
        self._compiled: dict[Any, Compiled] = {fn: Compiled(fn) for fn in fused}
        self._compiled[judge] = Compiled(logits_of, judge)

    @property
    def plainly(self) -> bool:
        """Whether the next step is not compiled: a graph would be compiled for each goal that is trained alone."""
        return self.goals.alone is not None

    def networks(
        self, image: Tensor, view: Tensor | Lazy, noise: Tensor, shake: Tensor, then: Callable[[Pass], T]
    ) -> T:
        if self.plainly:
            return super().networks(image, view, noise, shake, then)
        with self.fabric.autocast():
            mu, logvar = map(_single, self._encode(image.contiguous()))
            out = pass_of(mu, logvar, noise, shake, self.vae.parts[0], self._decode, lazy(self._structure, view))
        return then(out)

    def lazy(self, fn: Callable[..., Tensor], *args: Any) -> Lazy:
        return lazy(fn if self.plainly else self._compiled.get(fn, fn), *args)

    def judge_loss(self, image: Tensor, fakes: Tensor) -> Tensor:
        if self.plainly:
            return super().judge_loss(image, fakes)
        with self.fabric.autocast():  # a single fake is doubled, which leaves the mean as it is
            loss: Tensor = self._judge_loss(image.contiguous(), _for_any_rows(fakes))
        return loss

    def _walk(self) -> tuple[GoalOutput, Tensor]:
        begun = time.perf_counter()
        try:
            walked = super()._walk()
        except RuntimeError as why:  # compilers raise subclasses of it
            if self.first_seconds or self.plainly:
                raise
            reason = next((line for line in str(why).splitlines() if line.strip()), "")[:200]
            raise TrainError(f"--compile: this step cannot be compiled here ({type(why).__name__}: {reason})") from why
        if not self.plainly:
            self.first_seconds = self.first_seconds or time.perf_counter() - begun
        return walked
