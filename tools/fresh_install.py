"""Install an archive into a fresh environment that has only this Python's torch, and run the quick tests there.

tools/release.py uses it. Links to torch, triton and what they require spare a download of hundreds of megabytes. Every
other package is installed by pip.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from check_dist import ROOT, tracked

# Tests of the sources and tools of a checkout, which an installation does not have.
OF_THE_CHECKOUT = (
    "test_build.py",
    "test_cuda_offline.py",
    "test_docs.py",
    "test_recipes.py",
    "test_release.py",
    "test_release_files.py",
    "test_results_page.py",
    "test_rooms.py",
    "test_security.py",
    "test_simd.py",
    "test_torch_internals.py",
)


def required(name: str, known: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """Add an installed package and the packages that it requires to ``known``, and return it."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:  # the requirement is for another platform
        return known
    if found.name not in known:
        known[found.name] = found
        for wanted in found.requires or ():
            if "extra ==" not in wanted:
                required(re.split(r"[^\w.-]", wanted)[0], known)
    return known


def places(distribution: metadata.Distribution) -> Iterator[Path]:
    """Yield the files and folders of a package, at the top of the folder of packages."""
    names = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
    yield from (Path(str(distribution.locate_file(name))) for name in sorted(names))


def share_torch(packages: Path) -> None:
    """Link torch, triton and what they require from this Python's packages into another folder of packages."""
    for distribution in required("triton", required("torch", {})).values():
        if distribution.name == "setuptools":  # the other environment may have its own
            continue
        for place in places(distribution):
            link = packages / place.name
            if not link.exists():
                link.symlink_to(place.resolve())


def environment(folder: Path) -> Path:
    """Make an environment with the torch of this Python and nothing else but pip, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    share_torch(Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()))
    return python


def clean(variables: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment variables without those that lead to the checkout, and with ``variables``."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "BOMKERN_LOCAL_VERSION")
    return {**{name: value for name, value in os.environ.items() if name not in hidden}, **variables}


def install(archive: Path, folder: Path, extra: str, variables: Mapping[str, str]) -> Path:
    """Install an archive, with an extra unless it is empty, into a new environment, and return its Python."""
    python = environment(folder)
    wanted = f"bomkern{f'[{extra}]' * bool(extra)} @ {archive.resolve().as_uri()}"
    # pip would take a wheel that it built before from an sdist at the same place.
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", wanted]
    done = subprocess.run(command, env=clean(variables), cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"fresh_install: pip does not install {archive.name}:\n{(done.stdout + done.stderr)[-4000:]}")
    return python


def installed_package(python: Path, folder: Path) -> Path:
    """Return the folder of the installed package; its command and its compiled kernels have to work."""
    code = "import bomkern; print(bomkern.__file__); assert bomkern.info()['build'], bomkern.info()"
    ask = [str(python), "-W", "error::RuntimeWarning", "-c", code]
    done = subprocess.run(ask, env=clean({}), cwd=folder, capture_output=True, text=True)
    if not done.returncode:
        shown = subprocess.run([str(python.parent / "bomkern"), "info"], env=clean({}), cwd=folder, capture_output=True)
    if done.returncode or shown.returncode:
        raise SystemExit(f"fresh_install: the installed bomkern does not run:\n{done.stdout}{done.stderr}")
    package = Path(done.stdout.splitlines()[0]).parent
    if python.parent.parent not in package.parents:
        raise SystemExit(f"fresh_install: {package} is imported, which is not in {python.parent.parent}")
    return package


def test(python: Path, folder: Path) -> None:
    """Run the quick tests in a copy of the checkout without bomkern's sources: they import the installed one."""
    copy = folder / "tests-alone"
    for name in tracked():
        if not name.startswith("bomkern/") and Path(name).name not in OF_THE_CHECKOUT:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    installed_package(python, copy)
    command = [str(python), "-m", "pytest", "tests", "-m", "not slow", "-p", "no:cacheprovider"]
    command += ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    if subprocess.run(command, env=clean({}), cwd=copy).returncode:
        raise SystemExit("fresh_install: the quick tests fail on the wheel")
