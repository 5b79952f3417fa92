"""Build the sdist, and the wheel from it, twice in different folders, and check their files.

``python tools/check_dist.py [--no-compiler]`` runs in a Python with setuptools, ninja and torch. The exit code is 1
where a list of files differs from the rules below, or the two builds differ in a byte. It is also 1 where an archive
names a folder of this machine. ``--no-compiler`` builds as on a machine without one, in seconds. tools/release.py
builds with one, once, and does more.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parent.parent
SDIST = ("bomkern/*.py", "bomkern/py.typed", "csrc/*", "kernels/*", "tools/build_*.py")  # * also matches subfolders
SDIST_TOP = ("LICENSE", "MANIFEST.in", "README.md", "bomkern_command.py", "pyproject.toml", "setup.py")
EGG_INFO = ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt")
DIST_INFO = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
EPOCH = "1700000000"


def tracked() -> list[str]:
    """Return the project's files: those that git does not ignore, or all but caches without git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        names = [
            str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if "__pycache__" not in p.parts and p.suffix != ".so"
        ]
    return sorted(name for name in names if (ROOT / name).is_file())


def expected_sdist(files: list[str]) -> set[str]:
    """Return the files of a right sdist: all that a build reads, all of csrc/ and kernels/, and setuptools' files."""
    wanted = {name for name in files if any(fnmatch.fnmatch(name, rule) for rule in SDIST)}
    return {*wanted, *SDIST_TOP, "PKG-INFO", "setup.cfg", *(f"bomkern.egg-info/{name}" for name in EGG_INFO)}


def expected_wheel(files: list[str], version: str, compiled: bool) -> set[str]:
    """Return the files of a right wheel.

    They are the Python files of bomkern/ and kernels/, py.typed, the compiled library if there is one, the record of
    the build, and the metadata.
    """
    python = {n for n in files if n.startswith("bomkern/") and n.endswith(".py")}
    kernels = {f"bomkern/{n}" for n in files if n.startswith("kernels/") and n.endswith(".py")}
    library = {f"bomkern/_C{sysconfig.get_config_var('EXT_SUFFIX')}"} if compiled else set()
    return {
        *python,
        *kernels,
        *library,
        "bomkern/_build.json",
        "bomkern/py.typed",
        "bomkern_command.py",
        *(f"bomkern-{version}.dist-info/{n}" for n in DIST_INFO),
    }


def build(kind: str, source: Path, into: Path, compiler: bool, variables: Mapping[str, str]) -> Path:
    """Build an sdist or a wheel of the sources in a folder with the backend, without isolation."""
    environment = {"SOURCE_DATE_EPOCH": EPOCH, **os.environ, **variables, "PYTHONPATH": str(source / "tools")}
    if not compiler:
        (into / "no-path").mkdir(parents=True, exist_ok=True)
        environment |= {"PATH": str(into / "no-path"), "CXX": "nowhere", "CC": "nowhere"}
    code = f"import sys, build_backend; build_backend.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(into)], cwd=source, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"check_dist: building the {kind} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return next(into.glob("*.tar.gz" if kind == "sdist" else "*.whl"))


def build_both(
    folder: Path, files: list[str], compiler: bool, variables: Mapping[str, str] = MappingProxyType({})
) -> tuple[Path, Path]:
    """Build the sdist of a copy of the project, and the wheel from the sdist, with these environment variables."""
    copy, into = folder / "copy", folder / "dist"
    into.mkdir(parents=True)
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    # Stale files as in a working checkout, which must not be packed.
    (copy / "bomkern" / "_C.so").touch()
    (copy / "kernels" / "__pycache__").mkdir()
    (copy / "kernels" / "__pycache__" / "stale.cpython-311.pyc").touch()
    (copy / "build" / "lib" / "bomkern").mkdir(parents=True)
    (copy / "build" / "lib" / "bomkern" / "stale.py").touch()
    sdist = build("sdist", copy, into, compiler, variables)
    with tarfile.open(sdist) as packed:
        packed.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    shutil.copytree(copy / "build", source / "build")
    return sdist, build("wheel", source, into, compiler, variables)


def contents(path: Path) -> dict[str, bytes]:
    """Return the files of an archive; those of an sdist without its top folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(path) as sdist:
        members = [(m, sdist.extractfile(m)) for m in sdist.getmembers()]
        return {m.name.partition("/")[2]: file.read() for m, file in members if file is not None}


def compare(path: Path, want: set[str]) -> list[str]:
    """Return a line for each file that is missing from an archive or should not be in it."""
    have = set(contents(path))
    return [f"{path.name}: {name} is missing" for name in sorted(want - have)] + [
        f"{path.name}: {name} should not be there" for name in sorted(have - want)
    ]


def folders(path: Path, places: list[str]) -> list[str]:
    """Return a line for each file in an archive that names one of ``places``, folders of this machine."""
    lines = []
    for name, data in contents(path).items():
        for place in places:
            for text in re.findall(rb"[\x20-\x7e]*" + re.escape(place.encode()) + rb"[\x20-\x7e]*", data)[:1]:
                lines.append(f"{path.name}: {name} names {text.decode()[-120:]}")
    return lines


def check(sdist: Path, wheel: Path, files: list[str], compiler: bool, folder: Path) -> list[str]:
    """Return a line for each fault in the files of both archives, which were built in a folder."""
    wrong = compare(sdist, expected_sdist(files))
    wrong += compare(wheel, expected_wheel(files, wheel.name.split("-")[1], compiler))
    places = {str(place) for place in (folder, ROOT, Path.home(), sys.prefix, sys.base_prefix)} - {"/"}
    return wrong + [line for path in (sdist, wheel) for line in folders(path, sorted(places))]


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the files of the sdist and the wheel.")
    parser.add_argument("--no-compiler", action="store_true", help="build as on a machine without a compiler")
    args = parser.parse_args()
    files, compiler = tracked(), not args.no_compiler
    with tempfile.TemporaryDirectory() as name:
        first, second = (build_both(Path(name, part), files, compiler) for part in ("one", "a longer name, two"))
        wrong = check(*first, files, compiler, Path(name))
        wrong += [
            f"{a.name} is not the same when built again"
            for a, b in zip(first, second, strict=True)
            if a.read_bytes() != b.read_bytes()
        ]
        print(*wrong, sep="\n", end="\n" * bool(wrong))
        if not wrong:
            counts = [f"{path.name}: {len(contents(path))} files" for path in first]
            print(f"{', '.join(counts)}; all as expected")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
