"""Look up known vulnerabilities of the packages that CI installs: ``make audit`` runs pip-audit on requirements/ci.txt.

The exit code is 1 where there is a vulnerability. Where pip-audit is not installed or reaches no database, the tool
prints "not audited" and exits with 0.
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
    """Return from pip-audit's JSON the number of packages looked up, the packages missed, and the flaws.

    Returns None if ``answer`` is not such JSON.
    """
    try:
        packages = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return None
    missed = [f"{p['name']}: {p['skip_reason']}" for p in packages if "skip_reason" in p]
    vulnerable = []
    for package in packages:
        for flaw in package.get("vulns", ()):
            fixed = ", ".join(flaw["fix_versions"]) or "no release"
            vulnerable.append(f"{package['name']} {package['version']}: {flaw['id']}, fixed in {fixed}")
    return len(packages) - len(missed), missed, vulnerable


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
    if (answer := flaws(done.stdout)) is None:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        print(f"not audited: {errors[-1] if errors else 'pip-audit printed nothing'}")
        return 0
    count, missed, vulnerable = answer
    if not count:
        print(f"not audited: the database knows none of the {len(missed)} packages; the first: {missed[0]}")
        return 0
    print(*missed, *vulnerable, f"{LOCK.name}: {count} packages looked up, {len(vulnerable)} flaws", sep="\n")
    return int(bool(vulnerable))


if __name__ == "__main__":
    sys.exit(main())
