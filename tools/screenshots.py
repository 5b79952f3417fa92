"""Take the screenshots in docs/pictures of a run's report, with headless Chromium: ``python tools/screenshots.py RUN``.

RUN is a folder of `bomkern train`. Each picture is reduced to 64 colours.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
SIZES = {"report_desktop.png": (1280, 1900), "report_phone.png": (390, 1900)}  # CSS pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> int:
    report = Path(sys.argv[1]) / "report.html" if len(sys.argv) == 2 else None
    if report is None or not report.is_file():
        print("usage: python tools/screenshots.py RUN, the folder of a run with its report.html", file=sys.stderr)
        return 2
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print(f"screenshots need one of {', '.join(BROWSERS)} on the PATH", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        for name, (width, height) in SIZES.items():
            shot = Path(folder) / name
            options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"]
            command = [browser, *options, f"--screenshot={shot}", report.resolve().as_uri()]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            with Image.open(shot) as picture:
                picture.convert("RGB").quantize(64).save(PICTURES / name, optimize=True)
            print(PICTURES / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
