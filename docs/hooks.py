"""Insert figures, code and what it prints into the pages while they are built, so that none is typed by hand.

A page marks the place with a line of its own:

    <!-- bench CASE -->         time and memory of a case of bench/report/page.py, for each machine with results
    <!-- report PART -->        a part of the report: one of `PARTS`
    <!-- findings -->           the kinds of findings of `bomkern.diagnose`
    <!-- faults -->             how well `bomkern.diagnose` finds planted faults
    <!-- trainer -->            what settings of `bomkern train` lead to, and what the diagnosis says of them
    <!-- ranks -->              one batch on several processes: differences, and the numbers exchanged
    <!-- from PAGE: HEADING --> a section of a page in bench/results
    <!-- study DATA: TITLE -->  what the study of rules measured of a problem, or the command that does
    <!-- readme COMMAND -->     the part of the main README that a command writes
    <!-- rooms -->              the rooms of bomkern/ by floor, and what each may import
    <!-- nine goals -->         the goals of the trainer: formula, ideal and nadir
    <!-- code FILE: NAME -->    the source of a class or function
    <!-- example FILE -->       the code of a file in examples/
    <!-- printed NAME -->       what an example printed in the run that made its picture, docs/pictures/NAME.txt

The pages and pictures of bench/results are part of the site, as results/. Nothing here needs torch.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DIAGNOSIS = ROOT / "bomkern" / "diagnosis"
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "tools"))

import rooms  # noqa: E402  where tools/ is on the path

from bench.cases import OPS  # noqa: E402
from bench.readme import END, begin  # noqa: E402
from bench.report import page as report  # noqa: E402
from bench.report import worst  # noqa: E402
from bench.report.tables import Lines, by_size, memory, table, text, time  # noqa: E402
from bench.results import HERE, Results, committed  # noqa: E402

MARKER = re.compile(
    r"^<!-- (bench|report|findings|faults|trainer|ranks|from|study|readme|rooms|nine goals|code|example|printed)\b"
    r" ?(.*?) -->$",
    re.MULTILINE,
)
INTERVAL = re.compile(r"(?<= )\(([+-]?[\d.]+), ([+-]?[\d.]+)\)")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^)#\s]+")
# Pages of the site whose sources lie outside of docs/.
OUTSIDE = {"results/tests.md": "tests/README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
PARTS = {"whole step": report.steps, "loss section": report.section, "small calls": report.small}


class Missing(Exception):
    """The content of a marker is not in bench/results."""


def expand(markdown: str, page: str = "") -> str:
    """Return the page with its markers replaced by their content.

    Args:
        markdown: the page's text.
        page: the page's place in the site, such as problems/digits_vae.md; links in what is inserted start there.

    Raises:
        Missing: a marker has no content.
    """
    writers = {
        "bench": bench,
        "report": part,
        "findings": lambda _: findings(),
        "faults": lambda _: faults(),
        "trainer": lambda _: trainer(),
        "ranks": lambda _: ranks(),
        "from": lambda asked: section(asked, page),
        "study": lambda asked: study(asked, page),
        "readme": lambda asked: readme(asked, page),
        "rooms": lambda _: floors(),
        "nine goals": lambda _: nine_goals(),
        "code": code,
        "example": example,
        "printed": printed,
    }
    return MARKER.sub(lambda found: "\n".join(writers[found[1]](found[2])).strip(), markdown)


def _measured(results: Results) -> Lines:
    return text(f"Measured by `{results.command}`: {results.title}.")


def bench(case: str) -> Lines:
    if case not in report.CASES:
        raise Missing(f"bench/cases.py has no case {case!r}: there are {', '.join(report.CASES)}")
    lines = []
    for results in committed():
        both = results.of(case, report.BOTH)
        if not both:
            continue
        lines += _measured(results)
        lines += text("Time, and of each peer how many times that is: above 1x bomkern is the faster one.")
        for direction in report.DIRECTIONS:
            if results.of(case, direction):
                words = f"{report.CASES[case]}, {direction.replace('+', ' and ')}:"
                lines += [words, "", *worst.by_size(results, case, direction)]
        if everywhere := worst.of_all(results, case):
            lines += text(
                "The same forward and backward on every [kind of data](../results/README.md#kinds-of-data); in the "
                "tables above stands the worst. A peer whose result is wrong there is not timed."
            )
            lines += everywhere
        if any(row.get("peak_bytes", 0) >= 1e6 for peers in both.values() for row in peers.values()):
            lines += text("Memory: by how much it peaks above the inputs, gradients included.")
            lines += by_size(both, memory)
    if not lines:
        raise Missing(f"bench/results has nothing of {case!r}: run `make bench` and keep what it writes")
    return lines


def part(name: str) -> Lines:
    if name not in PARTS:
        raise Missing(f"there is no part {name!r} of the report: there are {', '.join(PARTS)}")
    lines = []
    for results in committed():
        if found := PARTS[name](results):
            kept = [line for line in found if not line.startswith(("## ", "!["))]
            lines += _measured(results) + kept
    if len([line for line in lines if line.startswith("|")]) == 0:
        raise Missing(f"bench/results has nothing of the {name}: run `make bench` and keep what it writes")
    return lines


def findings() -> Lines:
    """Return a table of the `Kind`s in bomkern/diagnosis, those that weigh most first, from the sources alone."""
    found: list[dict[str, Any]] = []
    for path in sorted(DIAGNOSIS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Kind":
                values = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
                found.append({"name": ast.literal_eval(node.args[0]), **values})
    if not found:
        raise Missing(f"{DIAGNOSIS} defines no kind of finding")
    found.sort(key=lambda kind: -kind["weight"])
    return table(["kind", "in short", "what it means"], [[k["name"], k["meaning"], k["explanation"]] for k in found])


def faults() -> Lines:
    found = _recorded("faults.json", "python -m bench.faults")
    lines = text(
        f"`{found['command']}` plants faults in small simulated runs. Of all faults {found['recall']:.0%} are named at "
        f"50% sure or more; of the runs without a fault {found['clean runs with an alarm']:.1%} raise such an alarm."
    )
    rows = [
        [fault, str(row["runs"]), f"{row['recall']:.0%}", f"{row['median steps after onset']:.0f}"]
        for fault, row in found["faults"].items()
    ]
    return lines + table(["planted", "runs", "named", "median steps until it is"], rows)


def _recorded(name: str, command: str) -> dict[str, Any]:
    """Return the content of a JSON file in bench/results that a command writes."""
    path = HERE / name
    if not path.exists():
        raise Missing(f"bench/results/{name} is not there: `{command}` writes it")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def trainer() -> Lines:
    found = _recorded("trainer.json", "python tools/trainer_figures.py FOLDER")
    lines = text(
        f"`{found['command']}` trains each of these for {found['steps']:,} steps with seed {found['seed']} "
        f"({found['machine']}, torch {found['torch']}, {found['date']}). PSNR and SSIM are those of held-out "
        f"reconstructions; each crop's own mean colour has {found['baseline_psnr']:.1f} dB and "
        f"{found['baseline_ssim']:.2f}."
    )
    rows, told = [], []
    for options, run in found["runs"].items():
        shares = sorted(run["share"].items(), key=lambda entry: -entry[1])
        most = ", ".join(f"{goal} {share:.0%}" for goal, share in shares if share >= 0.05)
        name, finding = f"`{options}`" if options else "the default", run["finding"]
        says = "no fault"
        if finding:
            says = f"{' and '.join(finding['goals']) or 'the run'}: {finding['kind']}, {finding['confidence']:.0%} sure"
            told += [f"- {name}: *{says}: {finding['evidence']}; {finding['suggestion']}*"]
        rows.append([name, run["says"], f"{run['psnr']:.1f} dB", f"{run['ssim']:.2f}", most, says])
    lines += table(
        ["`bomkern train`", "what it is", "PSNR", "SSIM", "who got the gradient", "the diagnosis, at the top"], rows
    )
    return [*lines, "In full, `bomkern diagnose` says:", "", *told] if told else lines


def ranks() -> Lines:
    found = _recorded("ranks.json", "python -m bench.ranks")
    worlds, scale = found["worlds"], found["scale"]
    lines = text(
        f"`{found['command']}` gives {found['batch']} samples to {', '.join(map(str, worlds))} gloo processes, and "
        "compares values and gradients, of a GoalSet the losses, weights and history of some steps, with those of a "
        "process that has all of them and no group. Largest difference over the largest value:"
    )
    rows = [
        [f"`{name}`", *(f"{x:.0e}" if x else "0" for values in row.values() for x in values)]
        for name, row in found["differences"].items()
    ]
    dtypes = list(next(iter(found["differences"].values())))
    lines += table(["", *(f"{dtype}, {world}" for dtype in dtypes for world in worlds)], rows)
    lines += text(
        f"A batch of {scale['batch']:,} with D = {scale['dims']} in float32, forward and backward on one thread a "
        f"process, median of {scale['calls']} on {found['cores']} cores ({found['machine']}); in brackets what a rank "
        "is handed by the others and hands over, both directions together:"
    )
    rows = [
        [f"`{name}`", *(f"{time(run['seconds'])} ({run['numbers'] * 4 / 1e6:.3g} MB)" for run in runs)]
        for name, runs in found["scaling"].items()
    ]
    return lines + table(["", *(f"{world} process{'es' * (world > 1)}" for world in worlds)], rows)


def section(asked: str, page: str) -> Lines:
    name, _, heading = asked.partition(": ")
    path = HERE / name
    if not path.exists():
        raise Missing(f"bench/results/{name} is not there")
    _, mark, rest = path.read_text().partition(f"\n## {heading}\n")
    if not mark:
        raise Missing(f"bench/results/{name} has no section {heading!r}")
    return relinked(rest.partition("\n## ")[0], f"bench/results/{name}", page).strip().splitlines()


def study(asked: str, page: str) -> Lines:
    data, _, title = asked.partition(": ")
    try:
        lines = section(f"policies.md: {title}", page)
    except Missing:
        return text(f"*{title}.* Not measured yet: `python -m bench.policies --data {data}`.")
    kept = [line for line in lines if not line.startswith("![")]  # the study's pictures are of several problems
    return [f"### {title}", "", *kept]


def readme(command: str, page: str) -> Lines:
    _, mark, rest = (ROOT / "README.md").read_text().partition(f"\n{begin(command)}\n")
    if not mark:
        raise Missing(f"README.md has no part that {command!r} writes")
    return relinked(rest.partition(END)[0], "README.md", page).strip().splitlines()


def floors() -> Lines:
    """Return a table of the rooms, the top floor first: the floors that tools/rooms.py checks, and docstrings."""
    first: dict[str, Path] = {}  # the package of each room, or its only module
    for module, path in rooms.modules().items():
        first.setdefault(rooms.room_of(module), path)
    lines = []
    for room, floor in sorted(rooms.FLOOR.items(), key=lambda entry: -entry[1]):
        name = f"{room}/" if first[room].name == "__init__.py" else f"{room}.py"
        allowed = [f"`{other}`" for other in sorted(rooms.ALONE.get(room, ()))]
        lines.append(
            [str(floor), f"`{name}`", _summary(first[room]), ", ".join(allowed) or ("all below" if floor else "none")]
        )
    return table(["floor", "room", "what is in it", "may import"], lines)


def _summary(path: Path) -> str:
    """Return the first sentence of a module's docstring."""
    told = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.split(r"(?<=\.)\s", " ".join(told.split()))[0].replace("``", "`")


def nine_goals() -> Lines:
    """Return a table of the trainer's goals: the docstrings of their functions, without the arguments."""
    nodes = ast.parse((ROOT / "bomkern" / "train" / "nine_goals.py").read_text()).body
    told = {node.name: ast.get_docstring(node) or "" for node in nodes if isinstance(node, ast.FunctionDef)}
    goals = [
        ast.literal_eval(call.args[0])
        for node in nodes
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NINE"
        for call in ast.walk(node.value)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Goal"
    ]
    words = {name: " ".join(told[name].partition("\nArgs:")[0].replace("``", "`").split()) for name in goals}
    rows = [
        [f"`{name}`", re.sub(r"^(?:Return|Compute) (.)", lambda first: first[1].upper(), words[name])] for name in goals
    ]
    return table(["goal", "raw value, ideal and nadir"], rows)


def code(asked: str) -> Lines:
    name, _, wanted = asked.partition(": ")
    path = ROOT / name
    if not path.is_file():
        raise Missing(f"{name} is not there")
    text = path.read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == wanted:
            return ["```{.python .source}", *(ast.get_source_segment(text, node) or "").splitlines(), "```"]
    raise Missing(f"{name} has no class or function {wanted!r}")


def example(name: str) -> Lines:
    return _fenced("python", ROOT / "examples" / name)


def printed(name: str) -> Lines:
    return _fenced("text", ROOT / "docs" / "pictures" / f"{name}.txt")


def _fenced(language: str, path: Path) -> Lines:
    """Return a block of code with the content of a file."""
    if not path.is_file():
        raise Missing(f"{path.relative_to(ROOT)} is not there")
    return [f"```{language}", *path.read_text().strip().splitlines(), "```"]


def relinked(markdown: str, source: str, page: str) -> str:
    """Return text with its relative links as they are from a page of the site.

    Args:
        markdown: the text.
        source: the file that it is from, by its path in the repository.
        page: the page that it goes to, by its path in the site.
    """
    pages = {path: name for name, path in OUTSIDE.items()}

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[0]))
        for folder, place in (("docs/", ""), ("bench/results/", "results/")):
            if path.startswith(folder):
                path = place + path.removeprefix(folder)
        return posixpath.relpath(pages.get(path, path), posixpath.dirname(page) or ".")

    return LINK.sub(link, markdown)


# What mkdocs calls. It is imported here, so that the tests can do without it.


def ops_navigation() -> list[dict[str, str]]:
    """Return the navigation's entries for the pages of docs/ops, named by their headings, in the benches' order."""
    order = list(OPS)
    pages = sorted((ROOT / "docs" / "ops").glob("*.md"), key=lambda page: order.index(page.stem.removesuffix("_loss")))
    return [{page.read_text().partition("\n")[0].lstrip("# ").strip("`"): f"ops/{page.name}"} for page in pages]


def on_config(config: Any, **_: Any) -> Any:
    """Fill the navigation's ops."""
    for entry in config.nav:
        if "Ops" in entry:
            entry["Ops"] = ops_navigation()
    return config


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add tests/README.md and the pages and pictures of bench/results, with the report generated from the figures."""
    from mkdocs.structure.files import File

    for path in sorted(HERE.glob("*")):
        name = f"results/{path.name}"
        if path.name == "README.md":
            files.append(File.generated(config, name, content=report.page(committed())))
        elif path.suffix in (".md", ".png"):
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for name, source in OUTSIDE.items():
        files.append(File.generated(config, name, content=relinked((ROOT / source).read_text(), source, name)))
    return files


def unbroken(markdown: str) -> str:
    """Return a page whose intervals, in the cells of tables, stay on one line."""
    lines = markdown.split("\n")
    return "\n".join(INTERVAL.sub("(\\1,\u00a0\\2)", line) if line.startswith("|") else line for line in lines)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    from mkdocs.exceptions import PluginError

    try:
        return unbroken(expand(markdown, page.file.src_uri))
    except Missing as why:
        raise PluginError(f"{page.file.src_path}: {why}") from why
