"""Run the Python code of every page of docs/ and of the README, page by page."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bomkern
from bomkern import Anchored, GoalSet, Minimize, StepGuard
from tests.support.pages import code_of, torchrun

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# tests/tools/test_recipe_pages.py and test_problem_pages.py run these.
ELSEWHERE = ("recipes/", "anchors.md", "problems/")
LANGUAGES = {"", "python", "text", "sh", "bash"}
# A page that makes its own data is a whole program: nothing is given to it.
WHOLE = ("index.md", "start.md", "water_filling.md", "how_it_works.md")
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


def trainers(names: dict[str, Any]) -> None:
    """The Trainer of transformers: a model with a GoalSet that waits for its anchor, and some rows."""
    pytest.importorskip("pytorch_lightning")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.goals = nn.Linear(12, 12), GoalSet(recon=Anchored(0.0, "baseline"))

        def trivial(self) -> dict[str, float]:
            return {"recon": 0.08}

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.goals({"recon": names["error"](self.decoder(x), x)}).loss}

    names |= {"model": Model(), "data": [{"x": row} for row in names["x"]]}
    names["args"] = transformers.TrainingArguments(
        output_dir=".", max_steps=2, use_cpu=True, disable_tqdm=True, report_to=[], save_strategy="no"
    )


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
    "trainers.md": trainers,
    "README.md": user_code,
}
PAGES = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))} | {"README.md": ROOT / "README.md"}
RUN = [name for name, path in PAGES.items() if code_of(path).strip() and not name.startswith(ELSEWHERE)]


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torchrun(monkeypatch)
    program = compile(code_of(PAGES[name]), str(PAGES[name]), "exec")
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        given: dict[str, Any] = {} if name in WHOLE else common()
        GIVEN.get(name, lambda names: None)(given)
        try:
            exec(program, given)
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def test_the_first_page_prints_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with torch.random.fork_rng(), contextlib.redirect_stdout(printed):
        exec(compile(code_of(PAGES["start.md"]), "start.md", "exec"), {})
    first, *others = printed.getvalue().splitlines()
    assert first == "every anchor fits"
    assert [line.split()[0] for line in others[2:5]] == ["name", "paint", "apart"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_no_page_is_listed_in_vain() -> None:
    assert {*GIVEN, *WHOLE} <= set(RUN)


@pytest.mark.parametrize("name", PAGES)
def test_no_code_is_left_out(name: str) -> None:
    """`code_of` sees a block of Python only if it is marked as such and not indented."""
    text = PAGES[name].read_text()
    fences = re.findall(r"^( *)(```+|~~~+)(.*)$", text, re.MULTILINE)
    assert all(indent == "" and mark == "```" and language in LANGUAGES for indent, mark, language in fences)
    others = re.findall(r"^```(?:text|sh|bash|)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert not [block for block in others if re.search(r"^(import \w|from \w+ import)", block, re.MULTILINE)]
