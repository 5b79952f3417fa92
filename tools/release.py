"""Build the sdist and the wheel of a release, check and test both, and say how to publish them. Nothing is uploaded.

``make release`` runs it in the Python of $(VENV). The wheel is for the torch of that Python, and its version says so
(``0.2.0+torch2.13.cpu``). Both archives are in dist/ if all checks pass:

- The tree has no changes, the version no tag, and CHANGELOG.md and CITATION.cff name the version and the same date.
- Each archive holds the files that it should and names no folder of this machine, and twine accepts its metadata.
- The library in the wheel loads on the systems that wheels are for (tools/check_library.py).
- pip installs each into a fresh environment. The sdist gives the same files as the wheel, built in another folder.
- The quick tests pass on the installed wheel; ``--no-test`` leaves them out.

``--dry-run`` goes on where the tree is not ready, and leaves no archives. ``--cuda`` demands CUDA kernels in the wheel.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import check_library
import fresh_install
from check_dist import ROOT, build_both, check, contents, tracked

VERSION = runpy.run_path(str(ROOT / "bomkern" / "_version.py"))


class Archive(NamedTuple):
    path: Path
    checked: list[str]

    def __str__(self) -> str:
        data = self.path.read_bytes()
        size = f"{len(data) / 1e6:.2f} MB"
        return (
            f"{self.path.name}: {size}, sha256 {hashlib.sha256(data).hexdigest()}; checked: {', '.join(self.checked)}"
        )


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def not_ready(root: Path, version: str) -> list[str]:
    """Return the reasons why the tree cannot be released as this version."""
    reasons = []
    if changed := _git(root, "status", "--porcelain"):
        reasons.append(f"the tree has changes that are not committed:\n{changed}")
    if _git(root, "tag", "--list", f"v{version}"):
        reasons.append(f"the tag v{version} exists; raise the version in bomkern/_version.py")
    top = re.search(r"^## (.+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    heading = re.fullmatch(rf"{re.escape(version)} - (\d{{4}}-\d\d-\d\d)", top[1] if top else "")
    if not heading:
        reasons.append(f"CHANGELOG.md begins with {top[1] if top else 'nothing'!r}, not with '{version} - YEAR-MM-DD'")
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", (root / "CITATION.cff").read_text(), re.MULTILINE))
    if cited.get("version") != version or (heading and cited.get("date-released") != heading[1]):
        reasons.append("CITATION.cff has another version or date-released than CHANGELOG.md")
    return reasons


def twine_check(paths: list[Path]) -> list[str]:
    """Return what twine finds wrong with the metadata of the archives."""
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, paths)], capture_output=True, text=True
    )
    if "No module named twine" in done.stderr:
        raise SystemExit("release: twine is not installed; `make release` installs it, or: pip install twine")
    return [f"twine: {line}" for line in (done.stdout + done.stderr).splitlines()] if done.returncode else []


def library_faults(wheel: Path, folder: Path) -> tuple[list[str], str]:
    """Return the faults of the compiled library in a wheel, and the symbol versions that it needs."""
    files = {name: data for name, data in contents(wheel).items() if name.startswith("bomkern/_C")}
    if len(files) != 1:
        return [f"{wheel.name}: holds {len(files)} compiled libraries, not one"], ""
    name, data = files.popitem()
    library = folder / Path(name).name
    library.write_bytes(data)
    return check_library.faults(library), check_library.as_text(check_library.versions(library))


def wrong_record(wheel: Path) -> list[str]:
    """Return a line if the version of a wheel is not that of the torch which its build recorded."""
    record = json.loads(contents(wheel)["bomkern/_build.json"])
    version, wanted = wheel.name.split("-")[1], VERSION["version_for"](record["torch"], record["cuda"])
    return [] if version == wanted else [f"{wheel.name}: its kernels are those of {wanted}"]


def differences(wheel: Path, package: Path) -> list[str]:
    """Return a line for each file of the package that an installation has otherwise than the wheel."""
    packed = {name: data for name, data in contents(wheel).items() if name.startswith("bomkern/")}
    there = {
        f"bomkern/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = sorted(name for name in packed.keys() | there.keys() if packed.get(name) != there.get(name))
    return [f"installed from the sdist, {name} differs from that of the wheel" for name in names]


def make(folder: Path, variables: Mapping[str, str], local: str, test: bool) -> list[Archive]:
    """Build and check both archives in a folder; exit with the faults if there are any."""
    print("release: building the sdist, and the wheel from it", flush=True)
    files = tracked()
    sdist, wheel = build_both(folder / "build", files, True, {**variables, "BOMKERN_LOCAL_VERSION": local})
    wrong = check(sdist, wheel, files, True, folder) + wrong_record(wheel) + twine_check([sdist, wheel])
    faults, needs = library_faults(wheel, folder)
    if wrong := wrong + faults:
        raise SystemExit("\n".join(wrong))
    print("release: installing the wheel", flush=True)
    extra = "test" if test else ""
    python = fresh_install.install(wheel, folder / "wheel", extra, {})
    fresh_install.installed_package(python, folder)
    # pip builds in a folder of another length, which must not change the library.
    print("release: building and installing the sdist", flush=True)
    other = fresh_install.install(sdist, folder / "sdist", "", variables)
    if wrong := differences(wheel, fresh_install.installed_package(other, folder)):
        raise SystemExit("\n".join(wrong))
    checks = ["files", "metadata"]
    archives = [
        Archive(sdist, [*checks, "installs, as the wheel to the byte"]),
        Archive(wheel, [*checks, f"library ({needs})", "installs"]),
    ]
    if test:
        print("release: testing the installed wheel", flush=True)
        fresh_install.test(python, folder)
        archives[1].checked.append("quick tests")
    return archives


def how_to_publish(version: str, sdist: str, wheel: str) -> str:
    return f"""To publish:
  git tag -a v{version} -m 'bomkern {version}' && git push origin v{version}
  python -m twine upload {sdist}
  Attach {wheel} to the release page of the tag: a package index takes no local version."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, check and test the archives of a release; upload nothing.")
    parser.add_argument("--no-test", action="store_true", help="leave out the quick tests")
    parser.add_argument("--dry-run", action="store_true", help="go on with a tree that is not ready; keep no archives")
    parser.add_argument("--cuda", action="store_true", help="demand CUDA kernels, for the CUDA of this Python's torch")
    args = parser.parse_args()
    version = VERSION["__version__"]
    reasons = not_ready(ROOT, version)
    print(*(f"release: {reason}" for reason in reasons), sep="\n", end="\n" * bool(reasons))
    if reasons and not args.dry_run:
        return 1
    import torch

    cuda = str(torch.version.cuda) if args.cuda else ""
    local = VERSION["version_for"](torch.__version__, cuda).partition("+")[2]
    variables = {"BOMKERN_BUILD": "cpu", "BOMKERN_BUILD_CUDA": str(int(args.cuda))}
    variables["SOURCE_DATE_EPOCH"] = _git(ROOT, "log", "-1", "--format=%ct")
    with tempfile.TemporaryDirectory() as name:
        archives = make(Path(name), variables, local, not args.no_test)
        print(*archives, sep="\n")
        if not args.dry_run:
            (ROOT / "dist").mkdir(exist_ok=True)
            for archive in archives:
                shutil.copy2(archive.path, ROOT / "dist")
            print(how_to_publish(version, *(f"dist/{archive.path.name}" for archive in archives)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
