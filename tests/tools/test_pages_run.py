"""Run the Python code of every page of docs/ and of the README, page by page, and check the commands they name."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bomkern
from bomkern import Anchored, GoalSet, Minimize, StepGuard, cli
from tests.support.pages import code_of, torchrun

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ELSEWHERE = ("recipes/", "anchors.md")  # tests/tools/test_recipe_pages.py runs these
# Pages that need a trainer's module: tests/goals/test_lightning.py and test_transformers.py run such code in full.
COMPILED = {"trainers.md": "the user's Lightning module and transformers' model"}
B, D = 16, 8


def goals_of(names: dict[str, Any], *more: str) -> GoalSet:
    return GoalSet({name: Anchored(0.0, 1.0) for name in (*names, *more)})


def common() -> dict[str, Any]:
    """Return what the pages take as given: a batch, networks, raw values and optimizers."""
    names: dict[str, Any] = {name: getattr(bomkern, name) for name in bomkern.__all__}
    x = torch.rand(B, 12)
    encoder, decoder, judge = nn.Linear(12, 2 * D), nn.Linear(D, 12), nn.Linear(12, 1)
    mu, logvar = encoder(x).chunk(2, 1)
    z = mu + torch.exp(logvar / 2) * torch.randn(B, D)
    recon = (decoder(z) - x).square().mean(1)
    model = nn.ModuleList([encoder, decoder, judge])

    def error(recon: Tensor, image: Tensor) -> Tensor:
        return (recon - image).square().mean(1)

    names |= {"torch": torch, "bomkern": bomkern, "anchors": bomkern.anchors, "B": B, "D": D, "x": x, "image": x}
    names |= {
        "encoder": encoder,
        "decoder": decoder,
        "model": model,
        "mu": mu,
        "logvar": logvar,
        "z": z,
        "data": range(100),
    }
    names |= {
        "data": range(100),
        "images": x,
        "labels": torch.arange(B) % 3,
        "recon": recon,
        "kl": bomkern.gaussian_kl(mu, logvar),
    }
    names |= {"realism": 1 - torch.sigmoid(judge(x))[:, 0], "logits": judge(x)[:, 0], "error": error}
    names |= {"optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)}
    return names


def active_units(names: dict[str, Any]) -> None:
    names["mu"] = names["mu"].detach()


def views(names: dict[str, Any]) -> None:
    def noisy(x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)

    names |= {"encode": lambda x: names["encoder"](x)[:, :D], "flip": noisy, "crop": noisy}


def parts(names: dict[str, Any]) -> None:
    names |= {"reconstruction": names["recon"], "alpha": 1.0, "beta": 4.0, "gamma": 1.0}


def several(names: dict[str, Any]) -> None:
    """GoalSet's page: micro-batches, a closure, labels that some samples lack, and lazy goals."""

    def raw() -> dict[str, Tensor]:
        mu, logvar = names["encoder"](names["x"]).chunk(2, 1)
        recon = names["error"](names["decoder"](mu), names["x"])
        return {"recon": recon, "kl": bomkern.gaussian_kl(mu, logvar), "realism": 1 - names["judge"](names["x"])[:, 0]}

    class MicroBatches:
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return (raw() for _ in range(8))

    def closure() -> Tensor:
        names["optimizer"].zero_grad()
        loss: Tensor = names["goals"](raw()).loss
        loss.backward()
        return loss

    for name in ("z", "recon", "kl", "logits"):  # several backwards read them
        names[name] = names[name].detach().requires_grad_()
    names["judge"] = names["model"][2]
    goals = goals_of({}, "recon", "kl", "realism")
    names |= {"micro_batches": MicroBatches(), "closure": closure, "guard": StepGuard(names["optimizer"], goals=goals)}
    names |= {"depth": names["recon"].detach(), "labelled": torch.rand(B) < 0.5, "penalty": torch.tensor(0.3)}
    names |= {"edge_error": names["error"]}


def lazies(names: dict[str, Any]) -> None:
    names |= {"z_swapped": names["z"].flip(0), "pixel_error": names["error"], "edge_error": names["error"]}
    names |= {"judge": lambda x: 1 - torch.sigmoid(names["model"][2](x))[:, 0]}
    names |= {"goals": goals_of({}, "pixels", "swap", "realism", "kl")}


def modules(names: dict[str, Any]) -> None:
    error = names["error"]  # the page has another one

    def raw(_: int = 0) -> dict[str, Tensor]:
        recon = error(names["decoder"](names["encoder"](names["x"])[:, :D]), names["x"])
        return {"recon": recon, "sharp": recon.sqrt()}

    class Raw(dict[str, Tensor]):
        """Raw values, and what makes those of a micro-batch."""

        __call__ = staticmethod(raw)

    decoder, encoder = names["decoder"].parameters(), names["encoder"].parameters()
    names |= {"state": GoalSet(recon=Anchored(0.0, 0.08), kl=Minimize(1.0)).state_dict(), "raw": Raw(raw())}
    names |= {"known": torch.rand(B, 12) < 0.5, "y": torch.rand(B, 12), "micro_batches": range(2)}
    names |= {"vae_optimizer": torch.optim.SGD(decoder, 0.1), "head_optimizer": torch.optim.SGD(encoder, 0.1)}
    names |= {"scaler": torch.amp.GradScaler("cpu")}


def judged(names: dict[str, Any]) -> None:
    names |= {"judge": names["model"][2], "held_out": torch.rand(B, 12), "step": 100}
    names |= {"mean_colour_of": lambda x: x.mean(1, keepdim=True).expand_as(x)}


def probed(names: dict[str, Any]) -> None:
    def step() -> None:
        mu, logvar = names["encoder"](names["x"]).chunk(2, 1)
        recon = names["error"](names["decoder"](mu), names["x"])
        realism = 1 - torch.sigmoid(names["model"][2](names["decoder"](mu)))[:, 0]
        raw = {"recon": recon, "kl": bomkern.gaussian_kl(mu, logvar), "realism": realism}
        names["optimizer"].zero_grad()
        names["goals"](raw).loss.backward()
        names["optimizer"].step()

    label = nn.functional.cross_entropy(torch.randn(B, 3), names["labels"], reduction="none")
    names |= {"step": step, "error_of_mean_colour": 0.08}
    names |= {"raw": {"recon": names["recon"], "label": label, "kl": names["kl"], "realism": names["realism"]}}


def ranks(names: dict[str, Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(12, 2 * D), nn.Linear(D, 12)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            mu, logvar = self.encoder(x).chunk(2, 1)
            return mu, logvar, mu + torch.randn_like(mu), (self.decoder(mu) - x).square().mean(1)

    torch.distributed.init_process_group("gloo")
    names |= {"model": Model(), "dist": torch.distributed}
    names |= {"DistributedDataParallel": nn.parallel.DistributedDataParallel}


def user_code(names: dict[str, Any]) -> None:
    """The README: scores, a loop over a loader, and lazies."""
    label = nn.functional.cross_entropy(torch.randn(B, 3), names["labels"], reduction="none")
    names |= {"realism_score": names["realism"], "loader": range(1), "cross_entropy": label}


# What a page takes as given beside `common`.
GIVEN: dict[str, Callable[[dict[str, Any]], None]] = {
    "ops/active_units.md": active_units,
    "ops/consistency_variance.md": views,
    "ops/total_correlation.md": parts,
    "ops/goal_set.md": several,
    "routing.md": lazies,
    "modules.md": modules,
    "moving_targets.md": judged,
    "scales.md": probed,
    "distributed.md": ranks,
    "README.md": user_code,
}
PAGES = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))} | {"README.md": ROOT / "README.md"}
RUN = [name for name, path in PAGES.items() if code_of(path).strip() and not name.startswith(ELSEWHERE)]


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torchrun(monkeypatch)
    program = compile(code_of(PAGES[name]), str(PAGES[name]), "exec")
    if name in COMPILED:
        return
    # A page that makes its own data is a whole program: nothing is given to it.
    whole = name in ("index.md", "start.md", "water_filling.md") or name.startswith("problems/")
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        given: dict[str, Any] = {} if whole else common()
        GIVEN.get(name, lambda names: None)(given)
        try:
            exec(program, given)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def test_no_page_is_listed_in_vain() -> None:
    assert {*GIVEN, *COMPILED} <= set(RUN)


# Commands.


def shell_lines(path: Path) -> list[str]:
    """Return the commands in a page's blocks without a language or for a shell, and those in its text."""
    text = path.read_text()
    blocks = re.findall(r"^ *```(?:sh|bash|)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return lines + re.findall(r"`((?:bomkern|make|python -m|python) [^`]+)`", outside)


COMMANDS = [
    pytest.param(shlex.split(line, comments=True), id=f"{name}: {line.partition('#')[0].strip()}")
    for name, path in PAGES.items()
    for line in shell_lines(path)
    if line.split()[:1] in (["bomkern"], ["make"], ["python"]) and ".NAME" not in line
]


@functools.cache
def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_exists(words: list[str]) -> None:
    """The target, the module or the file is there, and every option is in its help or source."""
    if words[0] == "make":
        assert words[1] in targets()
        return
    if words[0] == "python" and words[1] == "-m":
        module, arguments = words[2], words[3:]
    elif words[0] == "python":
        if words[1].endswith(".py") and "/" in words[1]:
            assert (ROOT / words[1]).is_file()
            source = (ROOT / words[1]).read_text()
            assert all(f'"{word}"' in source for word in words[2:] if word.startswith("--"))
        return
    else:
        module, arguments = "bomkern", words[1:]
    if module == "bomkern":
        options = [word.split("=")[0] for word in arguments if word.startswith("--")]
        help_text = io.StringIO()
        with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit):
            cli.main([*arguments[:1], "--help"])
        assert all(option in help_text.getvalue() for option in options)
        return
    spec = importlib.util.find_spec(module)
    assert spec, f"there is no module {module}"
    if module.split(".")[0] in ("bench", "tests"):
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
        sources = [path for folder in folders for path in folder.glob("*.py")] or [Path(spec.origin or "")]
        source = "".join(path.read_text() for path in sources)
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))
