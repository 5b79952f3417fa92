"""Check what a compiled library asks of the machine that loads it: symbol versions, libraries, and what it exports.

``python tools/check_library.py LIBRARY`` prints the newest symbol versions that the library needs, and a line for each
fault. The exit code is 1 if there is one. It needs readelf, of the binutils that g++ needs too.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

# The newest that Ubuntu 22.04 has, the oldest system that released wheels are for.
NEWEST = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}
# Libraries of the system, of torch and of CUDA; torch has loaded its own before bomkern is imported.
LIBRARIES = re.compile(
    r"(ld-linux.*|lib(c|m|dl|rt|pthread|gcc_s|gomp|stdc\+\+|c10|c10_cuda|torch|torch_cpu|torch_cuda|torch_python|cudart))"
    r"\.so[.\d]*"
)


def _readelf(library: Path, *flags: str) -> str:
    try:
        return subprocess.run(
            ["readelf", "--wide", *flags, str(library)],
            env={"LC_ALL": "C", "PATH": "/usr/local/bin:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except FileNotFoundError:
        raise SystemExit("check_library: readelf was not found; install binutils.") from None


def versions(library: Path) -> dict[str, tuple[int, ...]]:
    """Return the newest version of glibc, libstdc++ and the C++ ABI among the symbols that the library needs."""
    newest: dict[str, tuple[int, ...]] = {}
    for name, text in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)", _readelf(library, "--version-info")):
        newest[name] = max(newest.get(name, ()), tuple(map(int, text.split("."))))
    return newest


def as_text(found: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'.'.join(map(str, found[name]))}" for name in NEWEST if name in found)


def faults(library: Path) -> list[str]:
    """Return a line for each fault of a library of Python's extension bomkern._C."""
    found, lines = versions(library), []
    for name, newest in NEWEST.items():
        if found.get(name, ()) > newest:
            lines.append(
                f"needs {as_text({name: found[name]})}, at most {as_text({name: newest})}; use an older system"
            )
    dynamic = _readelf(library, "--dynamic")
    for name in re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic):
        if not LIBRARIES.fullmatch(name):
            lines.append(f"needs {name}, which is neither the system's, torch's nor CUDA's")
    for path in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.+)\]", dynamic):
        lines.append(f"looks for libraries in {path}")
    for line in _readelf(library, "--dyn-syms").splitlines():
        row = line.split()  # number, address, size, type, binding, visibility, section, name
        # Inline functions of torch and of the C++ library are WEAK or UNIQUE, and all libraries share one. The linker's
        # own symbols have no type.
        own = len(row) == 8 and row[4] == "GLOBAL" and row[3] != "NOTYPE" and row[6] != "UND"
        if own and row[7] != "PyInit__C":
            lines.append(f"exports {row[7]}")
    return [f"{library.name}: {line}" for line in lines]


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    library = Path(sys.argv[1])
    wrong = faults(library)
    print(f"{library.name} needs {as_text(versions(library))}", *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
