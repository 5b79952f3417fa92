"""Check that the commands on the pages exist: targets, modules, files, extras, and every option by its own parser."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bomkern import cli

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
PROGRAMS = ("bomkern", "make", "python", "pytest", "torchrun")
# Commands that no program of ours reads: why.
NOT_OURS = {"python train.py": "the reader's program", "python -m tests.NAME": "its text lists the names"}


class Parsed(Exception):
    """The arguments of a command were accepted; nothing after that is run."""


def commands_of(page: Path) -> list[str]:
    """Return the commands in a page's shell blocks, those without a language included, and those in its text."""
    text = page.read_text()
    blocks = re.findall(r"^ *```(?:sh|bash|)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`([^`\n]+)`", outside)
    plain = [re.sub(r"^(\w+=\S+ )+", "", line) for line in lines]
    return [line for line in plain if line.partition(" ")[0] in PROGRAMS and line.partition(" ")[2]]


COMMANDS = [
    pytest.param(line, id=f"{page.relative_to(ROOT)}: {line.partition('#')[0].strip()}")
    for page in PAGES
    for line in dict.fromkeys(commands_of(page))
    if not line.startswith(tuple(NOT_OURS))
]


@functools.cache
def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def parses(monkeypatch: pytest.MonkeyPatch, arguments: list[str], program: Callable[[], object]) -> None:
    """Run a program up to the point where it has read its arguments. A text may leave required ones out."""
    read = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        read(parser, args, namespace)
        raise Parsed

    def refuse(parser: argparse.ArgumentParser, message: str) -> None:
        assert message.startswith("the following arguments are required"), message
        asked = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert asked <= set(parser._option_string_actions), "an option is in no parser"
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    monkeypatch.setattr(cli.Parser, "error", refuse)
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(Parsed), warnings.catch_warnings():
        # The module may be there already. It stays: a second copy of it would fail other tests.
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
        program()


def check_python(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    if words[0] == "-m":
        module, arguments = words[1], words[2:]
        if module == "bomkern":
            parses(monkeypatch, arguments, lambda: cli.main(arguments))
            return
        spec = importlib.util.find_spec(module)
        assert spec, f"there is no module {module}"
        sources = [path for folder in spec.submodule_search_locations or () for path in Path(folder).glob("*.py")]
        sources = sources or [Path(spec.origin or "")]
        program = functools.partial(runpy.run_module, module, run_name="__main__")
    else:
        file, arguments = ROOT / words[0], words[1:]
        assert file.is_file(), f"there is no file {words[0]}"
        sources = [file]
        monkeypatch.syspath_prepend(str(file.parent))
        program = functools.partial(runpy.run_path, str(file), run_name="__main__")
    if not any(".parse_args(" in path.read_text() for path in sources):
        assert not [word for word in arguments if word.startswith("--")], "the program reads no options"
        return
    try:
        parses(monkeypatch, arguments, program)
    except ModuleNotFoundError as missing:
        if (missing.name or "").split(".")[0] in ("bench", "bomkern", "tests"):
            raise
        pytest.skip(f"needs {missing.name}")


def check(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    # A loop over examples is checked for one of them.
    words = shlex.split(line.partition(" > ")[0].replace("$name", "pinn"), comments=True)
    program, arguments = words[0], words[1:]
    if program == "make":
        named = [word for word in arguments if "=" not in word and not word.startswith("-")]
        assert set(named) <= targets()
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in arguments if word.startswith(("bench/", "tests/")))
    elif program == "bomkern":
        parses(monkeypatch, arguments, lambda: cli.main(arguments))
    elif program == "torchrun":
        check_python(monkeypatch, arguments[arguments.index("-m") :])
    else:
        check_python(monkeypatch, arguments)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_exists(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, line)


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "bomkern nothing",
        "bomkern train --nothing",
        "bomkern train --scales nothing",
        "bomkern diagnose --nothing",
        "python -m bench.nothing",
        "python -m bench.route --nothing",
        "python tools/nothing.py",
        "python tools/rooms.py --nothing",
        "python tools/screenshots.py --nothing",
        "torchrun --nproc-per-node=2 -m bomkern train --nothing",
        "pytest bench/ops/nothing.py",
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        check(monkeypatch, line)


def test_every_extra_exists() -> None:
    known = set(re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for page in PAGES:
        for extras in re.findall(r"(?:bomkern|-e '?\.)\[([\w,]+)\]", page.read_text()):
            assert set(extras.split(",")) <= known, page


def test_no_exception_is_listed_in_vain() -> None:
    every = [line for page in PAGES for line in commands_of(page)]
    assert all(any(line.startswith(start) for line in every) for start in NOT_OURS)
