"""Test torch's private names: none is missing, and only the package and the header that list them use any."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import bomkern
from bomkern.common import torch_internals as internals
from bomkern.common.torch_internals import registry

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "bomkern" / "common/torch_internals"
HEADER = ROOT / "csrc" / "torch_internals.h"
AT_HOME = sorted(HOME.glob("*.py"))
PYTHON = sorted({path for folder in ("bomkern", "kernels") for path in (ROOT / folder).rglob("*.py")} - {*AT_HOME})
CPP = sorted(
    path
    for folder in ("csrc", "kernels")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".h", ".cpp", ".cu") and path != HEADER
)


def test_this_torch_has_every_name() -> None:
    lacking = internals.missing()
    assert not lacking, "\n" + "\n".join(internals.describe(lacking))


# Python.

PUBLIC = {"_asdict", "_fields", "_make", "_replace"}  # documented attributes of NamedTuple
OTHERS = {"_batches_that_stepped"}  # private attributes of Lightning
BASES = {"Module", "Function", "Tensor", "Parameter", "Optimizer", "TorchDispatchMode", "TorchFunctionMode"}
PRIVATE = re.compile(r"_(?!_)\w*|experimental")
DOTTED = re.compile(r"torch(\.\w+)*\.(_(?!_)|experimental\b)[\w.]*")


def is_private(name: str) -> bool:
    return PRIVATE.fullmatch(name) is not None


def private_members() -> set[str]:
    """Return the private attributes of the objects that torch hands to its users."""
    optimizer = torch.optim.SGD([torch.zeros(1)], fused=True)
    things = [torch.zeros(1), torch.nn.Module(), torch.autograd.Function, optimizer, torch.Generator()]
    members = {name for thing in things for name in dir(thing)}
    return {name for name in members - set(dir(object)) if name != "_" and is_private(name)}


MEMBERS = private_members()


class Source:
    """Our source files: the private names that they define, and their classes with a torch base class."""

    def __init__(self, trees: Iterable[ast.AST], stems: Iterable[str] = ()) -> None:
        nodes = [node for tree in trees for node in ast.walk(tree)]
        self.defined = {stem for stem in stems if is_private(stem)}
        for node in nodes:
            self.defined |= set(_defines(node))
        self.derived = set(BASES)
        classes = [(node.name, _terminals(node.bases)) for node in nodes if isinstance(node, ast.ClassDef)]
        while more := {name for name, bases in classes if bases & self.derived} - self.derived:
            self.derived |= more

    def uses(self, tree: ast.AST, of_torch: bool = False) -> Iterator[tuple[int, str]]:
        """Yield line and name of each private torch name.

        ``of_torch`` is true inside a class with a torch base class.
        """
        for node in ast.iter_child_nodes(tree):
            inside = isinstance(node, ast.ClassDef) and bool(_terminals(node.bases) & self.derived)
            yield from ((getattr(node, "lineno", 0), name) for name in self._names(node, of_torch))
            yield from self.uses(node, inside if isinstance(node, ast.ClassDef) else of_torch)

    def _names(self, node: ast.AST, of_torch: bool) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if DOTTED.fullmatch(alias.name))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch" and not node.level:
            paths = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (path for path in paths if DOTTED.fullmatch(path))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if DOTTED.fullmatch(node.value):
                yield node.value
        elif isinstance(node, ast.FunctionDef):
            if of_torch and node.name in MEMBERS:
                yield node.name
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            yield from self._attribute(node.value, node.attr, of_torch)
        elif isinstance(node, ast.Call) and _name(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield from self._attribute(node.args[0], name.value, of_torch)

    def _attribute(self, owner: ast.AST, name: str, of_torch: bool) -> Iterator[str]:
        text = ast.unparse(owner)
        if text.split(".")[0] == "torch":
            yield f"{text}.{name}"
        elif name in PUBLIC | OTHERS:
            return
        elif name not in self.defined or (name in MEMBERS and (of_torch or text not in ("self", "cls", "super()"))):
            yield name


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _terminals(bases: list[ast.expr]) -> set[str]:
    return {ast.unparse(base).split(".")[-1] for base in bases}


def _defines(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _name(node.value) in ("self", "cls"):
        yield node.attr
    elif isinstance(node, ast.Assign) and _name(node.targets[0]) == "__slots__":
        yield from (part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant))
    # a class made by calling type()
    elif isinstance(node, ast.Call) and _name(node.func) == "type" and len(node.args) == 3:
        yield from (part.value for part in ast.walk(node.args[2]) if isinstance(part, ast.Constant))


OURS = Source([ast.parse(path.read_text()) for path in [*PYTHON, *AT_HOME]], [path.stem for path in PYTHON])


def test_no_other_python_reaches_private_torch() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in PYTHON
        for line, name in OURS.uses(ast.parse(path.read_text()))
    ]
    assert not found, "reach these through bomkern/common/torch_internals:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "planted",
    [
        "torch._C._len_torch_dispatch_stack()",
        "import torch._dynamo",
        "import torch.fx.experimental.proxy_tensor",
        "from torch.utils import _pytree",
        "from torch._subclasses.fake_tensor import FakeTensorMode",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "importlib.import_module('torch._inductor.config')",
        "x._version",
        "x._backward_hooks",
        "grad._values()",
        "torch.cpu._is_amx_fp16_supported()",
        "getattr(optimizer, '_step_supports_amp_scaling', False)",
        "class A(nn.Module):\n    def _apply(self, fn): ...",
        "class A(nn.Module):\n    def f(self): return self._buffers",
        "class A(Monitor):\n    def f(self): return super()._apply",
        "class A(torch.autograd.Function):\n    def f(ctx): return ctx._raw_saved_tensors",
    ],
)
def test_a_planted_name_is_found(planted: str) -> None:
    assert list(OURS.uses(ast.parse(planted)))


@pytest.mark.parametrize(
    "innocent",
    [
        "self._rows",
        "torch.ops.bomkern",
        "stats._replace(x=1)",
        "x.__dict__",
        "class A(nn.Module):\n    def _mine(self): ...",
    ],
)
def test_what_is_ours_or_public_is_not(innocent: str) -> None:
    assert not list(OURS.uses(ast.parse(innocent)))


def test_the_list_holds_what_the_package_reaches() -> None:
    found = [name for path in AT_HOME for _, name in OURS.uses(ast.parse(path.read_text()))]
    used = {name.rstrip(".").split(".")[-1] for name in found}
    listed = {needed.name.split(".")[-1] for needed in registry.NEEDED}
    assert used - {"_TorchDispatchModeKey"} <= listed, used - listed
    assert len({needed.name for needed in registry.NEEDED}) == len(registry.NEEDED)


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    ours, theirs = (lambda: None), (lambda: None)
    internals.mark_constant(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_the_import_leaves_the_compiler_of_torch_alone() -> None:
    """The import of torch._dynamo takes longer than all of bomkern."""
    code = "import sys, bomkern; bomkern.GoalSet(a=bomkern.Minimize(1.0)); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# C++.

PUBLIC_HEADERS = re.compile(
    r"ATen/(core/Tensor|core/List|Context|Parallel|ops/(?!\w*_dispatch\b)(?!\w*_native\b)\w+)\.h|"
    r"c10/(util/Exception|core/Event|cuda/CUDAGuard|cuda/CUDAStream)\.h|torch/library\.h"
)
PRIVATE_CPP = re.compile(
    r"torch::(autograd|jit|detail|impl)\b|\b(?:at|c10|torch)(?:::\w+)*::(impl|detail|native|functorch|cpu|cuda)::\w+|"
    r"c10::Dispatcher\b|DispatchKey\w*|\bkey_set\b|\bMKL_\w+\("
)
PUBLIC_CPP = re.compile(r"c10::cuda::\w+")


def private_cpp(source: str, with_torch: bool = True) -> list[str]:
    """Return torch's C++ headers and names that are private, or not known to be public."""
    headers = re.findall(r'#\s*include\s*[<"]((?:ATen|c10|torch|caffe2)/[^>"]+)[>"]', source)
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    names = [match[0] for match in PRIVATE_CPP.finditer(code) if not PUBLIC_CPP.fullmatch(match[0])]
    return [header for header in headers if not (with_torch and PUBLIC_HEADERS.fullmatch(header))] + names


def test_no_other_cpp_reaches_private_torch() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in CPP
        for name in private_cpp(path.read_text(), with_torch=path.is_relative_to(ROOT / "csrc"))
    ]
    assert not found, "reach these through csrc/torch_internals.h:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "planted",
    [
        "#include <torch/csrc/autograd/function.h>",
        "#include <ATen/ops/mm_cpu_dispatch.h>",
        "#include <c10/core/impl/VirtualGuardImpl.h>",
        "#include <ATen/native/cpu/utils.h>",
        "torch::autograd::Node node;",
        "at::native::add(x, y);",
        "at::cpu::empty({2});",
        "c10::impl::VirtualGuardImpl guard;",
        "at::functorch::isBatchedTensor(x);",
        "c10::Dispatcher::singleton();",
        "x.key_set().has(key);",
    ],
)
def test_planted_cpp_is_found(planted: str) -> None:
    assert private_cpp(f"#include <ATen/core/Tensor.h>\n{planted}\n")


def test_public_cpp_is_not() -> None:
    source = (
        "#include <torch/library.h>\n// torch::autograd::Node\nm.impl(name, f); c10::cuda::CUDAGuard guard(x.device());"
    )
    assert not private_cpp(source)
    assert private_cpp(source, with_torch=False)  # as for kernels/, which do not include torch


# A torch that lacks some names.


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Load the package with a torch that lacks some names, and restore torch afterwards."""

    def load(*names: str) -> ModuleType:
        with monkeypatch.context() as patch:
            for name in names:
                owner, _, last = name.rpartition(".")
                patch.delattr(internals.Internal(owner, "", "", "", "").find(), last)
            spec = importlib.util.spec_from_file_location("torch_internals_without", HOME / "__init__.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, module)  # for its relative imports
            try:
                spec.loader.exec_module(module)
            finally:
                for part in [name for name in sys.modules if name.startswith(f"{spec.name}.")]:
                    del sys.modules[part]
            assert {needed.name for needed in module.missing()} == set(names)
        return module

    return load


def test_other_paths_where_a_name_is_missing(without: Any) -> None:
    lacking = without(
        "torch._C._are_functorch_transforms_active",
        "torch.autograd.forward_ad._current_level",
        "torch._C._functorch.is_legacy_batchedtensor",
        "torch._C._len_torch_dispatch_stack",
        "torch._C._get_dispatch_mode",
        "torch._amp_foreach_non_finite_check_and_unscale_",
        "torch.cpu._is_amx_fp16_supported",
    )
    assert not lacking.under_transform() and not lacking.under_vmap()
    seen: list[tuple[bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((lacking.under_transform(), lacking.under_vmap()))
        return x.sum()

    torch.func.grad(look)(torch.ones(3))
    torch.func.vmap(look)(torch.ones(3, 2))
    assert seen == [(True, False), (True, True)]
    assert lacking.dispatch_modes() == 1 and lacking.traced_by_python() and lacking.cpu_has_amx_fp16() is True
    assert not lacking.is_legacy_batched(torch.ones(1))


@pytest.mark.parametrize("missing", [(), ("torch._amp_foreach_non_finite_check_and_unscale_",)], ids=["theirs", "ours"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_flags_what_is_not_finite(without: Any, missing: tuple[str, ...], dtype: torch.dtype) -> None:
    flag, one = without(*missing).flag_non_finite, torch.ones(())
    for bad, known, want in ((1.0, 0.0, 0.0), (float("inf"), 0.0, 1.0), (float("nan"), 0.0, 1.0), (1.0, 1.0, 1.0)):
        found = torch.tensor(known)
        grads = [torch.ones(3, dtype=dtype), torch.tensor([2.0, bad], dtype=dtype)]
        before = [grad.clone() for grad in grads]
        flag(grads, found, one)
        assert found.item() == want
        assert all(torch.equal(a.nan_to_num(0), b.nan_to_num(0)) for a, b in zip(grads, before, strict=True))


def test_what_has_no_other_path_says_so_when_it_is_used(without: Any) -> None:
    lacking = without("torch.utils._python_dispatch.TorchDispatchMode", "torch.utils._pytree.tree_flatten")
    with pytest.raises(
        NotImplementedError, match=r"no torch\.utils\._pytree\.tree_flatten, which bomkern needs for every"
    ):
        lacking.tree_flatten((1, 2))

    class Mode(lacking.TorchDispatchMode):  # type: ignore[misc, name-defined]
        pass

    with pytest.raises(NotImplementedError, match="lazy goals that draw"):
        Mode()


def test_info_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bomkern.info()["torch_lacks"] == []
    gone = internals.Internal("torch._C._gone", "2.0", "min_goal_loss", "torch.here", "is slower")
    monkeypatch.setattr(registry, "NEEDED", [*registry.NEEDED, gone])
    line = f"torch {torch.__version__} has no torch._C._gone (min_goal_loss): is slower; public instead: torch.here"
    assert bomkern.info()["torch_lacks"] == [line] and line in str(bomkern.info())


# tools/next_torch.py


def test_another_torch_has_a_folder_of_its_own() -> None:
    from tools import next_torch

    assert next_torch.folder_of("torch==2.15.0") == ".venv-torch-2.15.0"


def test_next_torch_prints_the_names_without_bomkern(tmp_path: Path) -> None:
    tool = ROOT / "tools" / "next_torch.py"
    hidden = "import sys, runpy; sys.modules['bomkern'] = None; sys.argv[1:] = ['--names']; "
    code = f"{hidden}{{}}; runpy.run_path({str(tool)!r}, run_name='__main__')"
    for before, status, said in (
        ("import torch", 0, "has every private name"),
        ("import torch; del torch._amp_foreach_non_finite_check_and_unscale_", 1, "(StepGuard): uses torch.isfinite"),
    ):
        command = [sys.executable, "-c", code.format(before)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == status and said in done.stdout, done.stdout + done.stderr
