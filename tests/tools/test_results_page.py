"""Test that the table of tests/README.md matches tests/results, and that the tests it names exist."""

from __future__ import annotations

import re

import pytest

from tests import report

TEXT = report.PAGE.read_text()
NAMED = sorted(set(re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", TEXT)))


def test_the_table_is_that_of_the_results() -> None:
    assert report.page(TEXT) == TEXT, "run python -m tests.report"


def test_the_bugs_have_tests() -> None:
    assert len(NAMED) > 20


@pytest.mark.parametrize(("module", "test"), NAMED)
def test_a_test_that_the_page_names_is_there(module: str, test: str) -> None:
    assert f"def {test}(" in (report.HERE / module).read_text()
