"""Convert docstrings to Markdown: sections become lists, and names of the package become links.

The usual parsers expect one name per entry and a type before a colon. The docstrings here have entries such as
"mu, logvar: ...", and describe the result in a sentence.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$")
COMMENT = re.compile(r"  # (?!type:)(.+)$")
NAME = re.compile(r"(?<![`\[])`(?:bomkern\.)?([A-Za-z]\w*(?:\.\w+)?)`(?!`)")


class Markdown(griffe.Extension):
    """Rewrite every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self.public = {name: pkg.members[name] for name in map(str, pkg.exports or ())}
        self._walk(pkg, set())
        # A module with the name of its function hides it: bomkern.total_correlation is the function.
        for name, member in self.public.items():
            if member.is_module and name in member.members:
                function = member.members[name]
                pkg.members[name] = self.public[name] = griffe.Alias(name, function, parent=pkg)

    def _walk(self, thing: griffe.Object, seen: set[str]) -> None:
        for member in thing.members.values():
            if not member.is_alias and member.path not in seen:
                seen.add(member.path)
                self._walk(member, seen)
        if not thing.docstring and thing.is_attribute and (comment := COMMENT.search(thing.source)):
            thing.docstring = griffe.Docstring(comment[1], parent=thing)  # a field of a NamedTuple
        if thing.docstring:
            thing.docstring.value = self.linked(markdown(thing.docstring.value))

    def linked(self, text: str) -> str:
        """Turn public names in single backticks into links."""

        def link(found: re.Match[str]) -> str:
            name, _, member = found[1].partition(".")
            if name not in self.public:
                return found[0]
            # A member without a docstring is described by its class.
            documented = not member or bool(getattr(self.public[name].all_members.get(member), "docstring", None))
            return f"[`{found[1]}`][bomkern.{found[1] if documented else name}]"

        return NAME.sub(link, text)


def markdown(docstring: str) -> str:
    out: list[str] = []
    lines = docstring.splitlines()
    while lines:
        line = lines.pop(0)
        heading = SECTION.match(line)
        if not heading:
            out.append(line)
            continue
        block = []
        while lines and (not lines[0].strip() or lines[0].startswith(" ")):
            block.append(lines.pop(0))
        body = textwrap.dedent("\n".join(block)).strip()
        out += [f"**{heading[1]}**", "", *_section(heading[1], body), ""]
    return "\n".join(out)


def _section(kind: str, body: str) -> list[str]:
    if kind == "Example":
        return ["```pycon", body, "```"]
    if kind == "Returns":
        return [body]
    items = []
    for line in body.splitlines():
        if line and not line.startswith(" "):
            names, colon, rest = line.partition(":")
            names = ", ".join(f"`{name}`" for name in names.split(", ")) if colon else names
            items.append(f"- {names}{colon}{rest}")
        else:
            items.append(line and f"    {line.strip()}")
    return items
