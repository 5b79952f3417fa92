"""Looks up known vulnerabilities of what CI installs: ``make audit``, by pip-audit, on requirements/ci.txt.

Exit code 1 where there is one. Where pip-audit is not installed or reaches no database, says so and exits with 0: that
is no finding, and no clean bill either.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements" / "ci.txt"


def flaws(answer: str) -> tuple[int, list[str], list[str]] | None:
    """Of pip-audit's JSON: how many were looked up, which were not, and the flaws; None where it is no answer."""
    try:
        packages = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return None
    missed = [f"{p['name']}: {p['skip_reason']}" for p in packages if "skip_reason" in p]
    found = []
    for package in packages:
        for flaw in package.get("vulns", ()):
            fixed = ", ".join(flaw["fix_versions"]) or "no release"
            found.append(f"{package['name']} {package['version']}: {flaw['id']}, fixed in {fixed}")
    return len(packages) - len(missed), missed, found


def main() -> int:
    if importlib.util.find_spec("pip_audit"):
        command = [sys.executable, "-m", "pip_audit"]
    elif path := shutil.which("pip-audit"):
        command = [path]
    else:
        print("not audited: pip-audit is not installed (pip install pip-audit)")
        return 0
    command += ["--requirement", str(LOCK), "--require-hashes", "--disable-pip", "--format", "json"]
    try:
        done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        print("not audited: no answer from the database within ten minutes")
        return 0
    if (told := flaws(done.stdout)) is None:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        print(f"not audited: {said[-1] if said else 'pip-audit said nothing'}")
        return 0
    count, missed, found = told
    if not count:
        print(f"not audited: the database knows none of the {len(missed)} packages; the first: {missed[0]}")
        return 0
    print(*missed, *found, f"{LOCK.name}: {count} packages looked up, {len(found)} flaws", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
