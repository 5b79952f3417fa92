"""Crops: nothing held out is trained on, and a user's folder is read with care."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")

import numpy as np
import torch
from PIL import Image

from bomkern.train import data


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(512, 512), (451, 300), (300, 451), (427, 640), (129, 128)])
def test_regions_are_disjoint_pixel_by_pixel(size: tuple[int, int]) -> None:
    seen = np.zeros((size[1], size[0]), int)
    for left, upper, right, lower in data.split_boxes(*size):
        assert 0 <= left < right <= size[0] and 0 <= upper < lower <= size[1]
        seen[upper:lower, left:right] += 1
    assert seen.max() == 1 and (seen == 0).any()


@pytest.mark.parametrize("size", [(512, 512), (640, 427), (300, 451)])
@pytest.mark.parametrize("image_size", [32, 64])
def test_no_held_out_pixel_reaches_a_training_crop(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], image_size: int
) -> None:
    """Paint the held-out region white and the gap grey: training crops stay black to the bit, through all resizing."""
    train, held_out = data.split_boxes(*size)
    picture = Image.new("RGB", size, (128, 128, 128))
    picture.paste((0, 0, 0), train)
    picture.paste((255, 255, 255), held_out)
    monkeypatch.setattr(data, "shipped_photographs", lambda: [data.Photograph("painted", picture)])
    found = data.load(None, image_size)
    assert found.train.batch(400, np.random.default_rng(0)).max() == 0
    assert found.held_out.grid(50).min() == 255


@pytest.mark.parametrize("image_size", [32, 64, 128])
def test_shipped_photographs_give_crops_of_every_size(image_size: int) -> None:
    found = data.load(None, image_size)
    assert len(found.names) >= 5 and not found.skipped and len(found.train) > 20
    batch = found.train.batch(8, np.random.default_rng(0))
    assert batch.shape == (8, image_size, image_size, 3) and batch.dtype == torch.uint8
    grid = found.held_out.grid(50)
    assert 20 <= len(grid) <= 50 and torch.equal(grid, found.held_out.grid(50))
    x = data.to_float(batch, torch.device("cpu"))
    assert x.shape == (8, 3, image_size, image_size) and x.min() >= 0 and x.max() <= 1


def test_batches_are_a_function_of_the_generator() -> None:
    crops = data.load(None, 32).train
    first, again, other = (crops.batch(6, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_folder_with_bad_files_is_read_and_says_what_it_skipped(tmp_path: Path) -> None:
    for i in range(6):
        noise(80, 70, i).save(tmp_path / f"good{i}.png")
    (tmp_path / "nested").mkdir()
    noise(90, 90).convert("L").save(tmp_path / "nested" / "grey.jpg")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    whole = (tmp_path / "good0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notes.txt").write_text("no image, and none expected")
    noise(20, 20).save(tmp_path / "tiny.png")
    found = data.load(tmp_path, 32)
    assert len(found.names) == 7
    assert [s.split(":")[0] for s in found.skipped] == ["broken.png", "cut.png", "tiny.png"]
    assert "smaller than a crop" in found.skipped[2]


def test_many_files_are_split_by_file(tmp_path: Path) -> None:
    for i in range(10):
        Image.new("RGB", (64, 64), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
    found = data.load(tmp_path, 32)
    train = set(found.train.batch(500, np.random.default_rng(0))[..., 0].flatten().tolist())
    held_out = set(found.held_out.grid(100)[..., 0].flatten().tolist())
    assert train and held_out and not train & held_out


def test_decompression_bombs_are_refused(tmp_path: Path) -> None:
    Image.new("1", (20_000, 12_000)).save(tmp_path / "bomb.png")  # 30 kB on disk, 720 MB as RGB
    for i in range(5):
        noise(64, 64, i).save(tmp_path / f"{i}.png")
    found = data.load(tmp_path, 32)
    assert len(found.names) == 5 and len(found.skipped) == 1 and "decompression bomb" in found.skipped[0]


def test_large_images_are_reduced_and_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        noise(900, 700, i).save(tmp_path / f"{i}.png")
    photographs, _ = data.read_folder(tmp_path, 32)
    assert min(photographs[0].image.size) == 128
    monkeypatch.setattr(data, "MEMORY", 1000)
    photographs, skipped = data.read_folder(tmp_path, 32)
    assert len(photographs) == 1 and len(skipped) == 2 and "are read already" in skipped[0]


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="no such folder"):
        data.load(tmp_path / "absent", 32)
    with pytest.raises(data.DataError, match="no images"):
        data.load(tmp_path, 32)
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"1 images, none usable \(broken.png"):
        data.load(tmp_path, 32)
    noise(40, 40).save(tmp_path / "small.png")
    with pytest.raises(data.DataError, match="cannot be split"):
        data.load(tmp_path, 32)
