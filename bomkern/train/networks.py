"""The networks: a VAE whose latent has a structure and an appearance part, and a patch discriminator.

Normalisation is GroupNorm throughout, so a row of the batch does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bomkern import Lazy, lazy

SMALLEST = 4  # side of the innermost feature map, in pixels
DECODES = 4  # of each image
JOINT = 2**20  # largest number of elements of images decoded in one call on a CPU


class Pass(NamedTuple):
    """Result of a forward pass of `VAE`. B images, D = structure + appearance latents.

    What is lazy (`bomkern.lazy`) is evaluated, or put into a graph, only for the rows that some goal needs.
    """

    z: Tensor  # [B, D] sample of the posterior
    mu: Tensor  # [B, D]
    logvar: Tensor  # [B, D]
    mean: Tensor  # [B, structure] mean of the structure, a part of mu
    view: Tensor | Lazy  # [B, structure] the same of the image's other view
    recon: Tensor | Lazy  # [B, 3, S, S]
    swap: Tensor | Lazy  # [B, 3, S, S] own structure, appearance of the next row
    moved_structure: Tensor | Lazy  # [B, 3, S, S] after unit noise on the structure
    moved_appearance: Tensor | Lazy  # [B, 3, S, S] after unit noise on the appearance


def widths(image_size: int, width: int) -> list[int]:
    """Return the channels at each halving from ``image_size`` to `SMALLEST`: ``width``, doubling up to 4 ``width``."""
    return [width * min(4, 2**k) for k in range(int(math.log2(image_size // SMALLEST)))]


def _norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // 8), channels, affine=affine)


class Encoder(nn.Module):
    """Map images [B, 3, S, S] to mu and logvar, [B, D] each."""

    def __init__(self, image_size: int, latents: int, width: int) -> None:
        super().__init__()
        channels = widths(image_size, width)
        layers: list[nn.Module] = []
        for before, after in zip([3, *channels], channels, strict=False):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), _norm(after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1] * SMALLEST**2, 2 * latents)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.head(self.trunk(image * 2 - 1).flatten(1)).chunk(2, dim=1)
        # A smooth bound keeps exp from overflowing, far from any useful posterior.
        return mu, 8 * torch.tanh(logvar / 8)


class Block(nn.Module):
    """Upsample bilinearly to twice the side, convolve 3 x 3, normalise, scale and shift by the appearance, SiLU."""

    def __init__(self, before: int, after: int, appearance: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, padding=1, padding_mode="replicate")  # zeros draw a frame
        self.norm = _norm(after, affine=False)
        self.style = nn.Linear(appearance, 2 * after)

    def forward(self, x: Tensor, appearance: Tensor) -> Tensor:
        x = self.norm(self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear")))
        scale, shift = self.style(appearance)[..., None, None].chunk(2, dim=1)
        return F.silu(torch.addcmul(shift, x, 1 + scale))


class Decoder(nn.Module):
    """Decoder: the structure is the first feature map, and the appearance only scales and shifts its channels."""

    def __init__(self, image_size: int, structure: int, appearance: int, width: int) -> None:
        super().__init__()
        # Half the channels at the full size, where most of the time goes.
        channels = [*widths(image_size, width)[::-1], width // 2]
        self.start = nn.Linear(structure, channels[0] * SMALLEST**2)
        self.mood = nn.Sequential(nn.Linear(appearance, 64), nn.SiLU())
        self.blocks = nn.ModuleList(Block(before, after, 64) for before, after in pairwise(channels))
        self.out = nn.Conv2d(channels[-1], 3, 3, padding=1, padding_mode="replicate")
        self.tint = nn.Linear(64, 3)

    def forward(self, structure: Tensor, appearance: Tensor) -> Tensor:
        x = self.start(structure).unflatten(1, (-1, SMALLEST, SMALLEST)).contiguous(memory_format=torch.channels_last)
        mood = self.mood(appearance)
        for block in self.blocks:
            x = block(x, mood)
        return torch.sigmoid(self.out(x) + self.tint(mood)[..., None, None])


class _ChannelsLast(torch.autograd.Function):
    """Identity whose gradient is always channels last, so that a sum over it has one order whatever reads the image."""

    @staticmethod
    def forward(ctx: Any, image: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else grad.contiguous(memory_format=torch.channels_last)


def _same(out: Pass) -> Pass:
    return out


class VAE(nn.Module):
    """Encoder and decoder; the latent is ``[structure, appearance]``.

    Args:
        image_size: 32, 64, 128 or 256.
        structure, appearance: latents of each part.
        width: channels at the full size.
    """

    def __init__(self, image_size: int, structure: int, appearance: int, width: int) -> None:
        super().__init__()
        self.parts = [structure, appearance]
        self.encoder = Encoder(image_size, structure + appearance, width)
        self.decoder = Decoder(image_size, structure, appearance, width)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _image(self, structure: Tensor, appearance: Tensor) -> Tensor:
        decoded = self.decoder(structure, appearance)
        image: Tensor = _ChannelsLast.apply(decoded.to(torch.promote_types(decoded.dtype, torch.float32)))
        return image

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents. [B, D] -> [B, 3, S, S] in [0, 1]."""
        structure, appearance = z.split(self.parts, dim=1)
        image: Tensor = self.decoder(structure, appearance)
        return image

    def structure(self, image: Tensor) -> Tensor:
        """Encode images, [B, 3, S, S], to the means of their structure, [B, structure]."""
        mu: Tensor = self.encoder(image)[0]
        return mu[:, : self.parts[0]]

    def forward(
        self, image: Tensor, view: Tensor | Lazy, noise: Tensor, shake: Tensor, then: Callable[[Pass], Any] = _same
    ) -> Any:
        """Encode images, and prepare reconstruction, swap and two perturbations, which are decoded in one call.

        Args:
            image, view: [B, 3, S, S].
            noise: [B, D] standard normal, for the posterior sample.
            shake: [B, D] standard normal, added to one part at a time.
            then: called with the pass inside of this forward, where DDP and FSDP2 expect all calls of the networks.

        Returns:
            What ``then`` returns; without it, the `Pass`.
        """
        mu, logvar = self.encoder(image)
        # Decode in one call, unless the feature maps are so large that the C library frees their memory after use.
        large = image.device.type == "cpu" and DECODES * image.numel() > JOINT
        return then(pass_of(mu, logvar, noise, shake, self.parts[0], self._image, lazy(self.structure, view), large))


def pass_of(
    mu: Tensor,
    logvar: Tensor,
    noise: Tensor,
    shake: Tensor,
    structure: int,
    decode: Callable[[Tensor, Tensor], Tensor],
    view: Tensor | Lazy,
    apart: bool = False,
) -> Pass:
    """Return the `Pass` of a code. ``structure`` counts its latents; ``apart`` asks for a call for each decode."""
    z = torch.addcmul(mu, noise, torch.exp(logvar / 2))
    (s, a), (ds, da) = (x.split([structure, x.shape[1] - structure], 1) for x in (z, shake))
    codes = ((s, a), (s, a.roll(-1, 0)), (s + ds, a), (s, a + da))
    images = [lazy(partial(decode) if apart else decode, *code) for code in codes]
    return Pass(z, mu, logvar, mu[:, :structure], view, *images)


class Discriminator(nn.Module):
    """Classify patches as real, [B, 3, S, S] -> logits [B, 1, S/8, S/8] (PatchGAN, Isola et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Conv2d(2 * width, 1, 1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.body(image * 2 - 1)
        return logits
