"""Test the crops: no training on held-out pixels, and careful reading of a user's folder."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
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
    """Paint the held-out region white and the gap grey. Training crops stay exactly black through all resizing."""
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


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _huge_headers(folder: Path) -> None:
    """Write small files whose headers claim gigabytes of pixels and more."""

    def saved(kind: str, **options: object) -> bytearray:
        file = io.BytesIO()
        Image.new("RGB", (64, 64)).save(file, kind, **options)
        return bytearray(file.getvalue())

    most = 2**31 - 1
    png = _chunk(b"IHDR", struct.pack(">IIBBBBB", most, most, 8, 2, 0, 0, 0)) + _chunk(
        b"IDAT", zlib.compress(b"\0" * 99)
    )
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    bmp = saved("BMP")
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    (folder / "b.bmp").write_bytes(bmp)
    jpeg = saved("JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff" * 4
    (folder / "c.jpg").write_bytes(jpeg)
    gif = struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    (folder / "d.gif").write_bytes(b"GIF89a" + gif + b"\2\2L\1\0;")
    (folder / "e.ppm").write_bytes(b"P6 2000000000 2000000000 255\n" + b"\0" * 99)
    tiff = saved("TIFF")
    for tag in (256, 257):
        at = max(tiff.find(struct.pack("<HHI", tag, kind, 1)) for kind in (3, 4))
        tiff[at : at + 12] = struct.pack("<HHII", tag, 4, 1, 100_000)
    (folder / "f.tif").write_bytes(tiff)
    webp = saved("WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64), (9, 9, 9))])
    at = webp.index(b"VP8X") + 12
    webp[at : at + 6] = (15_999).to_bytes(3, "little") * 2
    (folder / "g.webp").write_bytes(webp)


def test_huge_headers_cost_no_memory(tmp_path: Path) -> None:
    """Each file is refused by name, in a process that could not hold a tenth of the smallest."""
    _huge_headers(tmp_path)
    code = (
        "import resource, sys; from pathlib import Path; from bomkern.train import data\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: before = peak(); data.read_folder(Path(sys.argv[1]), 32)\n"
        "except data.DataError: pass\n"
        "paths, _ = data._find(Path(sys.argv[1])); found = []\n"
        "for path in paths:\n"
        "    try: data._read(path, 32)\n"
        "    except Exception as why: found.append(f'{path.name} {why}')\n"
        "print(peak() - before, *found, sep='\\n')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    grown, *found = done.stdout.splitlines()
    assert int(grown) < 64 * 1024, f"{grown} KiB for headers alone"
    assert [line.split()[0] for line in found] == sorted(path.name for path in tmp_path.iterdir())
    assert all("decompression bomb" in line for line in found), found


def test_a_bomb_is_refused_whatever_pillow_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other libraries lift Pillow's limit for the whole process. Pillow's warning goes to the log."""
    Image.new("1", (20_000, 12_000)).save(tmp_path / "error.png")
    Image.new("1", (10_000, 9_500)).save(tmp_path / "warning.png")
    noise(64, 64).save(tmp_path / "good.png")
    for limit in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            photographs, skipped = data.read_folder(tmp_path, 32)
        assert [p.name for p in photographs] == ["good.png"]
        assert [s.split(":")[0] for s in skipped] == ["error.png", "warning.png"]
        assert all("decompression bomb" in s for s in skipped)


def test_links_are_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir(), folder.mkdir()
    noise(64, 64).save(outside / "private.png")
    noise(64, 64, 1).save(folder / "good.png")
    (folder / "linked.png").symlink_to(outside / "private.png")
    # if it were read, the image would be in training and held out at once
    (folder / "twice.png").symlink_to(folder / "good.png")
    (folder / "deep").symlink_to(outside)
    (folder / "self").symlink_to(folder)
    (folder / "dangling.png").symlink_to(outside / "absent.png")
    (tmp_path / "photos").symlink_to(folder)  # the named folder may be a link
    for named in (folder, tmp_path / "photos"):
        photographs, skipped = data.read_folder(named, 32)
        assert [p.name for p in photographs] == ["good.png"]
        assert [s.split(":")[0] for s in skipped] == ["dangling.png", "deep", "linked.png", "self", "twice.png"]
        assert all("a link, which is not followed" in s for s in skipped)
    (folder / "good.png").unlink()
    with pytest.raises(data.DataError, match=r"none usable.*not followed"):
        data.read_folder(folder, 32)


def test_no_program_is_started_for_an_image(tmp_path: Path) -> None:
    """Pillow would pass PostScript under another name to Ghostscript."""
    noise(64, 64).save(tmp_path / "page.eps")
    (tmp_path / "page.eps").rename(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as opened:
        assert opened.format == "EPS"
    with pytest.raises(data.DataError, match="not an image of the kinds that are read"):
        data.read_folder(tmp_path, 32)


def test_what_is_no_file_or_too_large_a_one_is_not_opened(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "good.png")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would block forever
    with (tmp_path / "sparse.webp").open("wb") as file:
        file.truncate(data.MAX_BYTES + 1)
    photographs, skipped = data.read_folder(tmp_path, 32)
    assert [p.name for p in photographs] == ["good.png"]
    assert skipped == ["sparse.webp: 512 MiB, refused as larger than 512 MiB"]


def test_a_decoder_that_breaks_costs_its_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png"):
        noise(64, 64).save(tmp_path / name)
    real = data._read

    def read(path: Path, size: int) -> Image.Image:
        if path.name == "a.png":
            raise struct.error("unpack requires 4 bytes")
        return real(path, size)

    monkeypatch.setattr(data, "_read", read)
    photographs, skipped = data.read_folder(tmp_path, 32)
    assert [p.name for p in photographs] == ["b.png"] and skipped == ["a.png: unpack requires 4 bytes"]


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
