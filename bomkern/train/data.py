"""Crops of photographs; the held-out crops come from regions that training never sees.

A photograph is cut in two before anything is resized. The first 68% of its longer side is for training, the last 30% is
held out, and the gap between them is unused. Training therefore sees no pixel of a held-out crop, nor a blend with one.
A folder of several images is split by whole files instead.
"""

from __future__ import annotations

import os
import warnings
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SHIPPED = {
    "skimage.data": ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}
TRAIN, HELD_OUT = 0.68, 0.30  # fractions of the longer side
WINDOWS = (64, 128)  # sides of the crops in source pixels; each is resized to the image size
WHOLE_FILES = 5  # a folder with this many images is split by file
MAX_PIXELS = 64_000_000  # of one image: a larger one is refused as a decompression bomb
MAX_BYTES = 2**29  # of one file: more than MAX_PIXELS ever need; some decoders read the whole file first
MEMORY = 2 * 2**30  # bytes of pixels kept
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow looks at the content, not the suffix: other formats, such as PostScript, would start programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

Box = tuple[int, int, int, int]  # left, upper, right, lower, as Pillow has it


class DataError(Exception):
    """The images cannot be used; the message is for the user."""


class Photograph(NamedTuple):
    name: str
    image: Image.Image  # RGB


def split_boxes(width: int, height: int) -> tuple[Box, Box]:
    """Return the disjoint training and held-out boxes of a photograph of this size, along its longer side."""
    if width >= height:
        return (0, 0, int(width * TRAIN), height), (width - int(width * HELD_OUT), 0, width, height)
    return (0, 0, width, int(height * TRAIN)), (0, height - int(height * HELD_OUT), width, height)


def shipped_photographs() -> list[Photograph]:
    """Return the colour photographs inside the installed scikit-image and scikit-learn; nothing is downloaded."""
    photographs = []
    for package, names in SHIPPED.items():
        for name in names:
            path = Path(str(files(package).joinpath(name)))
            if path.is_file():  # releases differ in what they ship
                with Image.open(path) as image:
                    photographs.append(Photograph(name, image.convert("RGB")))
    if not photographs:
        raise DataError("the installed scikit-image and scikit-learn ship none of the photographs; use --data FOLDER")
    return photographs


def _find(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the sorted image files under a folder, and the links among them, which are not followed."""
    paths, links = [], []
    for root, folders, names in os.walk(folder):  # os.walk does not enter linked folders
        for path in (Path(root, name) for name in folders + names):
            if path.is_symlink() and (path.suffix.lower() in SUFFIXES or path.is_dir()):
                links.append(f"{path.relative_to(folder)}: a link, which is not followed")
            elif path.suffix.lower() in SUFFIXES and path.is_file():
                paths.append(path)
    return sorted(paths), sorted(links)


def _read(path: Path, image_size: int) -> Image.Image:
    """Read an image as RGB; its size is checked before a pixel is decoded."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{size // 2**20} MiB, refused as larger than {MAX_BYTES // 2**20} MiB")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels, refused as a decompression bomb")
            if min(width, height) < image_size:
                raise ValueError(f"{width} x {height} pixels, smaller than a crop of {image_size}")
            opened.draft("RGB", (4 * image_size, 4 * image_size))
            image: Image.Image = opened.convert("RGB")
            return image


def read_folder(folder: Path, image_size: int) -> tuple[list[Photograph], list[str]]:
    """Read the images under a folder; return them, and the skipped files as ``"name: why"``.

    An image whose shorter side exceeds four times the image size is reduced to that. Corrupt files, decompression
    bombs, links, images smaller than a crop, and images that do not fit into `MEMORY` are skipped.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such folder")
    paths, skipped = _find(folder)
    photographs, used = [], 0
    for path in paths:
        name = str(path.relative_to(folder))
        if used > MEMORY:
            skipped.append(f"{name}: {MEMORY // 2**20} MiB of images are read already")
            continue
        try:
            image = _read(path, image_size)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            skipped.append(f"{name}: refused as a decompression bomb")
        except UnidentifiedImageError:
            skipped.append(f"{name}: not an image of the kinds that are read ({', '.join(FORMATS)})")
        except Exception as why:  # decoders raise anything on a damaged file, and the other files still count
            skipped.append(f"{name}: {' '.join(str(why).split()) or type(why).__name__}")
        else:
            shrink = 4 * image_size / min(image.size)
            if shrink < 1:
                width, height = (max(4 * image_size, round(side * shrink)) for side in image.size)
                image = image.resize((width, height), Image.Resampling.LANCZOS)
            used += 3 * image.width * image.height
            photographs.append(Photograph(name, image))
    if not photographs:
        reason = f"{len(skipped)} images, none usable ({'; '.join(skipped[:3])})" if skipped else "no images"
        raise DataError(f"--data {folder}: {reason}; it takes {', '.join(s[1:] for s in SUFFIXES)}")
    return photographs, skipped


class Crops:
    """Square crops of some images at one size, kept as uint8 in host memory.

    Args:
        images: RGB images; every pixel of them may be used.
        image_size: side of a crop in pixels, S.

    Each image is kept once per window that fits, reduced so that the window becomes the crop. If none fits, the image
    is kept unchanged.
    """

    def __init__(self, images: list[Image.Image], image_size: int) -> None:
        self.image_size = image_size
        self.sheets: list[list[np.ndarray]] = []
        for image in images:
            if min(image.size) < image_size:
                continue
            sheets = []
            for window in WINDOWS:
                if window >= image_size and min(image.size) >= window:
                    size = tuple(max(image_size, round(side * image_size / window)) for side in image.size)
                    sheets.append(np.asarray(image.resize((size[0], size[1]), Image.Resampling.LANCZOS)))
            self.sheets.append(sheets or [np.asarray(image)])

    def __len__(self) -> int:
        """Return the number of crops that fit side by side, the length of an epoch."""
        s = self.image_size
        return sum((sheet.shape[0] // s) * (sheet.shape[1] // s) for sheets in self.sheets for sheet in sheets)

    def _cut(self, sheet: np.ndarray, top: int, left: int) -> np.ndarray:
        return sheet[top : top + self.image_size, left : left + self.image_size]

    def batch(self, count: int, rng: np.random.Generator, rows: slice = slice(None)) -> Tensor:
        """Draw random crops, half of them mirrored: a photograph, then a window of it. -> uint8 [count, S, S, 3].

        Args:
            rows: return only these of the ``count`` drawn crops.
        """
        draws = rng.random((count, 5))[rows]
        crops = np.empty((len(draws), self.image_size, self.image_size, 3), np.uint8)
        for i, (photo, window, y, x, mirror) in enumerate(draws):
            sheets = self.sheets[int(photo * len(self.sheets))]
            sheet = sheets[int(window * len(sheets))]
            top = int(y * (sheet.shape[0] - self.image_size + 1))
            crop = self._cut(sheet, top, int(x * (sheet.shape[1] - self.image_size + 1)))
            crops[i] = crop[:, ::-1] if mirror < 0.5 else crop
        return torch.from_numpy(crops)

    def grid(self, limit: int) -> Tensor:
        """Return at most ``limit`` crops, the same in every call, spread over the images. -> uint8 [n, S, S, 3]."""
        s, each = self.image_size, max(1, limit // max(1, len(self.sheets)))
        chosen = []
        for sheets in self.sheets[:limit]:
            positions = [
                (sheet, y, x)
                for sheet in reversed(sheets)  # the widest view first
                for y in range(0, sheet.shape[0] - s + 1, s)
                for x in range(0, sheet.shape[1] - s + 1, s)
            ]
            picks = np.unique(np.linspace(0, len(positions) - 1, min(each, len(positions))).round().astype(int))
            chosen += [self._cut(*positions[i]) for i in picks]
        return torch.from_numpy(np.stack(chosen))


class Data(NamedTuple):
    train: Crops
    held_out: Crops
    names: list[str]
    skipped: list[str]


def load(folder: Path | None, image_size: int) -> Data:
    """Return training and held-out crops of the shipped photographs, or of the images in a folder."""
    photographs, skipped = read_folder(folder, image_size) if folder else (shipped_photographs(), [])
    if folder and len(photographs) >= WHOLE_FILES:
        every = max(2, min(10, len(photographs) // 2))
        held_out = [p.image for p in photographs[::every]]
        train = [p.image for i, p in enumerate(photographs) if i % every]
    else:
        boxes = [split_boxes(*p.image.size) for p in photographs]
        train = [p.image.crop(box) for p, (box, _) in zip(photographs, boxes, strict=True)]
        held_out = [p.image.crop(box) for p, (_, box) in zip(photographs, boxes, strict=True)]
    data = Data(Crops(train, image_size), Crops(held_out, image_size), [p.name for p in photographs], skipped)
    if not data.train.sheets or not data.held_out.sheets:
        raise DataError(
            f"{len(photographs)} image{'s' * (len(photographs) > 1)} cannot be split into training and held-out "
            f"regions of {image_size} px: give {WHOLE_FILES} images or more, larger ones, or a smaller --image-size"
        )
    return data


def to_float(crops: Tensor, device: torch.device) -> Tensor:
    """Convert uint8 [n, S, S, 3] to float32 [n, 3, S, S] in [0, 1] on the device, channels last, asynchronously."""
    if device.type == "cuda":
        crops = crops.pin_memory()
    return crops.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
