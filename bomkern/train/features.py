"""Image features of the goals: edges, colour, structural similarity, a filter bank.

Images are [B, 3, S, S] in [0, 1].
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bomkern.common.decorators import constant

BINS = 8  # thresholds of the colour distribution, per channel
ORIENTATIONS = 4
SCALES = 3
CHROMA = 4.0  # on photographs, coarse colour then weighs as much as two octaves of the bank


@constant
def _constants(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tensors of `_make_constants`; a compiled graph holds them instead of making them in every call."""
    return _make_constants(device, dtype)


@lru_cache(maxsize=32)
def _make_constants(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make luma [1, 3, 1, 1], Sobel filters [2, 1, 3, 3], Gabor bank [2 * ORIENTATIONS, 1, 7, 7], thresholds [BINS]."""
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    sobel = torch.stack([across, across.T])[:, None]
    y, x = torch.meshgrid(torch.arange(-3.0, 4.0), torch.arange(-3.0, 4.0), indexing="ij")
    window = torch.exp(-(x.square() + y.square()) / (2 * 1.6**2))
    bank = []
    for k in range(ORIENTATIONS):
        angle = math.pi * k / ORIENTATIONS
        phase = 2 * math.pi / 5 * (x * math.cos(angle) + y * math.sin(angle))
        for wave in (torch.cos(phase), torch.sin(phase)):
            gabor = window * (wave - (window * wave).sum() / window.sum())  # no response to a constant
            bank.append(gabor / gabor.norm())
    thresholds = (torch.arange(BINS) + 0.5) / BINS
    moved = [t.to(device, dtype) for t in (luma, sobel, torch.stack(bank)[:, None], thresholds)]
    return moved[0], moved[1], moved[2], moved[3]


def luminance(image: Tensor) -> Tensor:
    """Compute the Rec. 601 luma. [B, 3, S, S] -> [B, 1, S, S]."""
    return (image * _constants(image.device, image.dtype)[0]).sum(1, keepdim=True)


def edges(image: Tensor) -> Tensor:
    """Compute Sobel derivatives of the luminance at half size, across and down. [B, 3, S, S] -> [B, 2, S/2-2, S/2-2].

    At half size they show contours. The finest octave is mostly texture and noise, which pixel error and SSIM measure.
    """
    return F.conv2d(F.avg_pool2d(luminance(image), 2), _constants(image.device, image.dtype)[1])


def mean_colour(image: Tensor) -> Tensor:
    """Compute the mean colour of each image. [B, 3, S, S] -> [B, 3]."""
    return image.mean((2, 3))


def flat(image: Tensor) -> Tensor:
    """Return the trivial reconstruction: every pixel has the image's own mean colour. Same shape."""
    return image.mean((2, 3), keepdim=True).expand_as(image)


def colour_distribution(image: Tensor) -> Tensor:
    """Compute soft cumulative histograms of R, G, B, R-G, G-B, B-R at `BINS` thresholds. [B, 3, S, S] -> [B, 6, BINS].

    The squared difference of two of them is the Cramer distance. It grows with the distance that colours must move,
    unlike that of plain histograms. The differences of channels are included because each channel can be right while
    the hues are wrong: magenta beside green instead of grey.
    """
    thresholds = _constants(image.device, image.dtype)[3]
    softness = 0.5 / BINS
    pixels = image.flatten(2)
    pixels = torch.cat([pixels, pixels - pixels.roll(-1, 1) + 0.5], dim=1)
    if torch.compiler.is_compiling():  # the same with pixels innermost, which makes the inner loop longer
        return torch.sigmoid((thresholds[:, None] - pixels[:, :, None]) / softness).mean(3)
    return torch.sigmoid((thresholds - pixels[..., None]) / softness).mean(2)


def _window(maps: Tensor, width: int) -> Tensor:
    """Return a sliding mean of ``width`` as a matrix [side, side - width + 1], for maps [..., side]."""
    at = torch.arange(maps.shape[-1], device=maps.device)
    ahead = at[:, None] - at[: 1 - width]
    return ((ahead >= 0) & (ahead < width)).to(maps.dtype) / width


def dissimilarity(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``1 - SSIM`` (Wang et al. 2004) with a uniform 7 x 7 window. Two [B, 3, S, S] -> [B], in [0, 2]."""
    maps = torch.cat([a, b, a * a, b * b, a * b], dim=1)
    if torch.compiler.is_compiling():  # the same by matrix products; transposed, which leaves the mean below unchanged
        window = _window(maps, 7)
        pooled = (maps @ window).mT @ window
    else:
        pooled = F.avg_pool2d(maps, 7, stride=1)
    ma, mb, aa, bb, ab = pooled.chunk(5, dim=1)
    c1, c2 = 0.01**2, 0.03**2
    covariance = ab - ma * mb
    variance = aa - ma * ma + bb - mb * mb
    ssim = (2 * ma * mb + c1) * (2 * covariance + c2) / ((ma * ma + mb * mb + c1) * (variance + c2))
    return 1 - ssim.mean((1, 2, 3))


def early_vision(image: Tensor) -> list[Tensor]:
    """Compute contrast energies of a fixed Gabor bank, 4 orientations at 3 octaves, and coarse opponent colours.

    The energies are ``sqrt(even^2 + odd^2)`` of quadrature pairs on the luminance (Adelson & Bergen 1985), 3 tensors
    [B, 4, s, s]. R-G and (R+G)/2-B follow at a quarter of the size, [B, 2, S/4, S/4], times `CHROMA`. They replace the
    features of a pretrained network, which would need a download. They describe far less: orientation, scale, contrast
    and colour, but no objects.
    """
    bank = _constants(image.device, image.dtype)[2]
    level = luminance(image)
    energies = []
    for octave in range(SCALES):
        if octave:
            level = F.avg_pool2d(level, 2)
        pair = F.conv2d(level, bank).unflatten(1, (ORIENTATIONS, 2))
        energies.append(torch.sqrt(pair.square().sum(2) + 1e-4))  # gives a finite slope at 0
    red, green, blue = F.avg_pool2d(image, 4).unbind(1)
    return [*energies, CHROMA * torch.stack([red - green, (red + green) / 2 - blue], dim=1)]


def perceptual_distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Sum the mean squared differences between the parts of two `early_vision` results. -> [B]."""
    return torch.stack([(p - q).square().mean((1, 2, 3)) for p, q in zip(a, b, strict=True)]).sum(0)


def photometric(image: Tensor, noise: Tensor) -> Tensor:
    """Return another view with the same structure: contrast, gains, saturation and brightness change, edges stay.

    Args:
        image: [B, 3, S, S].
        noise: [B, 6] standard normal: contrast, three gains, saturation, brightness.
    """
    contrast, gain, saturation, brightness = noise[..., None, None].split([1, 3, 1, 1], dim=1)
    mean = image.mean((1, 2, 3), keepdim=True)
    view = (image - mean) * torch.exp(0.2 * contrast) + mean
    grey = luminance(view)
    view = grey + (view - grey) * torch.exp(0.3 * saturation)
    seen: Tensor = (view * torch.exp(0.15 * gain) + 0.1 * brightness).clamp(0, 1)
    return seen
