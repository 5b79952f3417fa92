"""Test that the files for those who cite the project, or report to it, say what is so."""

from __future__ import annotations

import re
from pathlib import Path

import bomkern

ROOT = Path(__file__).resolve().parents[2]


def test_the_citation_is_of_this_version_and_license() -> None:
    citation = dict(re.findall(r"^([\w-]+): (\S.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert citation["version"] == bomkern.__version__ and citation["type"] == "software"
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()


def test_every_report_of_an_issue_brings_what_the_command_prints() -> None:
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert len(forms) == 2
    for form in forms:
        field = form.read_text().partition("id: info")[2]
        assert "`bomkern info`" in field and "required: true" in field, form.name
