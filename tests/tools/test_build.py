"""Test the build ladder: the backend's requirements, and setup.py's message for a missing rung."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import build_extension
import build_ladder

ROOT = Path(__file__).resolve().parents[2]


def ask_ladder(**env: str) -> subprocess.CompletedProcess[str]:
    """Ask what would be built, as the real build does, by compiling tiny files."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BOMKERN_")}
    return subprocess.run(
        [sys.executable, "tools/build_extension.py"], cwd=ROOT, env={**clean, **env}, capture_output=True, text=True
    )


def write_program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_no_compiler_is_a_pure_python_install(tmp_path: Path) -> None:
    done = ask_ladder(PATH=str(tmp_path), CXX="nowhere")
    assert done.returncode == 0 and "no C++ compiler was found" in done.stdout and "install g++" in done.stdout


@pytest.mark.parametrize("wish", [{"BOMKERN_BUILD_CUDA": "1"}, {"BOMKERN_BUILD": "cpu"}])
def test_no_compiler_is_fatal_where_kernels_are_demanded(tmp_path: Path, wish: dict[str, str]) -> None:
    done = ask_ladder(PATH=str(tmp_path), CXX="nowhere", **wish)
    assert done.returncode != 0 and "install g++" in done.stderr and next(iter(wish)) in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_demanded_of_a_torch_without_it_is_fatal() -> None:
    done = ask_ladder(BOMKERN_BUILD_CUDA="1")
    assert done.returncode != 0 and "install a CUDA build of torch first" in done.stderr
    assert "Traceback" not in done.stderr


def test_cuda_refused() -> None:
    done = ask_ladder(BOMKERN_BUILD_CUDA="0")
    assert done.returncode == 0 and "unset it to build the CUDA kernels" in done.stdout
    assert done.stdout.startswith("bomkern: would be built without CUDA kernels")


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (
            'case "$*" in *-std=*) echo "c++: error: unrecognized option -std=c++20" >&2; exit 1;; esac',
            "unrecognized option",
        ),
        ('case "$*" in *--version*) ;; *) echo "c++: fatal error: no room left" >&2; exit 1;; esac', "no room left"),
    ],
)
def test_a_compiler_that_does_not_do_steps_down_with_its_own_words(does: str, said: str, tmp_path: Path) -> None:
    old = write_program(tmp_path / "g++", f'{does}\nexec {shutil.which("g++")} "$@"')
    done = ask_ladder(CXX=str(old), BOMKERN_BUILD_CUDA="0")
    assert done.returncode == 0 and "without compiled kernels" in done.stdout
    assert said in done.stdout and "set CXX" in done.stdout and "Traceback" not in done.stderr
    assert ask_ladder(CXX=str(old), BOMKERN_BUILD="cpu").returncode != 0


def test_without_openmp_the_kernels_are_built_for_one_thread(tmp_path: Path) -> None:
    does = 'case "$*" in *-fopenmp*) echo "ld: cannot find -lgomp" >&2; exit 1;; esac'
    bare = write_program(tmp_path / "g++", f'{does}\nexec {shutil.which("g++")} "$@"')
    done = ask_ladder(CXX=str(bare), BOMKERN_BUILD_CUDA="0")
    assert done.returncode == 0 and "without CUDA kernels" in done.stdout
    assert "on one thread" in done.stdout and "cannot find -lgomp" in done.stdout


def test_missing_headers_of_python_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_ladder.sysconfig, "get_path", lambda name: str(tmp_path))
    reason = build_ladder.why_no_compiler()
    assert f"{tmp_path}/Python.h" in reason and "-dev'" in reason


def test_windows_is_python_alone_whatever_compiler_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_ladder.platform, "system", lambda: "Windows")
    reason = build_ladder.why_no_compiler()
    assert "Windows" in reason and "install" not in reason


def test_old_torch_is_refused_in_one_line() -> None:
    for old in ("2.10.0", "2.10.1+cu126", "1.13.0"):
        with pytest.raises(SystemExit, match=r"needs torch>=2\.11.*" + re.escape(old)):
            build_extension.refuse_old_torch(old)
    for fine in ("2.11.0", "2.13.0+cpu", "2.15.0", "3.0", "2.16.0a0+git1234"):
        build_extension.refuse_old_torch(fine)


KNOWN = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")


@pytest.mark.parametrize(
    ("visible", "chosen", "why", "remark"),
    [
        ([], "8.0;8.6;9.0;10.0;12.0+PTX", "", ""),
        (["9.0"], "9.0", "", ""),
        (["9.0", "7.5"], "7.5;9.0", "", ""),
        (["13.0"], "12.0+PTX", "", "does not know"),
        (["12.0", "13.0"], "12.0+PTX", "", "does not know"),
        (["10.3"], "10.0+PTX", "", "does not know"),
        (["7.0"], "", "older toolkit", ""),
    ],
)
def test_architectures_are_those_of_the_gpus_as_far_as_nvcc_knows(
    visible: list[str], chosen: str, why: str, remark: str
) -> None:
    found = build_ladder.choose_architectures(visible, KNOWN)
    assert found[0] == chosen
    assert why in found[1] and bool(why) == bool(found[1]) and remark in found[2] and bool(remark) == bool(found[2])


def test_flags_of_architectures_do_not_hang_on_a_folder_called_arch() -> None:
    assert build_ladder.architecture_flags("9.0") == ["-gencode=arch=compute_90,code=sm_90"]
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        build_ladder.architecture_flags("99.0")


def test_memory_is_that_of_the_container(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "memory.max").write_text("3000000\n")
    (tmp_path / "outer" / "inner" / "memory.max").write_text("max\n")
    assert list(build_ladder._container_limits(own, tmp_path)) == [3000000]
    own.write_text("4:memory:/one\n2:cpu:/one\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("5000000\n")
    assert list(build_ladder._container_limits(own, tmp_path)) == [5000000]
    assert list(build_ladder._container_limits(tmp_path / "nothing", tmp_path)) == []
    assert 0 < build_ladder.memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (
            "[1/2] c++ -c x\nFAILED: x.o\n/tmp/a/probe.cpp:2:10: fatal error: Python.h: No such file",
            "Python.h: No such file",
        ),
        (
            "nvcc fatal   : Unsupported gpu architecture 'compute_130'",
            "nvcc fatal   : Unsupported gpu architecture 'compute_130'",
        ),
        (
            "/usr/bin/ld: cannot find -lgomp\ncollect2: error: ld returned 1 exit status",
            "/usr/bin/ld: cannot find -lgomp",
        ),
        ("nothing of use", "it broke"),
    ],
)
def test_the_line_that_says_what_is_wrong(printed: str, said: str) -> None:
    assert build_ladder.first_error(printed, "it broke") == said


@pytest.mark.parametrize("wish", ["yes", "2"])
def test_a_wish_that_is_neither_is_refused(wish: str) -> None:
    done = ask_ladder(BOMKERN_BUILD_CUDA=wish)
    assert done.returncode != 0 and "BOMKERN_BUILD_CUDA must be one of '0', '1', or unset" in done.stderr


def test_a_sanitizer_that_is_none_is_refused() -> None:
    done = ask_ladder(BOMKERN_SANITIZE="memory")
    assert done.returncode != 0 and "BOMKERN_SANITIZE must be one of 'address,undefined', 'thread'" in done.stderr


def test_a_wish_for_debug_lines_that_is_neither_is_refused() -> None:
    done = ask_ladder(BOMKERN_DEBUG="yes")
    assert done.returncode != 0 and "BOMKERN_DEBUG must be one of '0', '1', or unset" in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    ("env", "lines"), [({}, False), ({"BOMKERN_DEBUG": "1"}, True), ({"BOMKERN_SANITIZE": "thread"}, True)]
)
def test_debug_lines_are_in_the_library_only_where_asked_for(env: dict[str, str], lines: bool, tmp_path: Path) -> None:
    """Compile with the flags of setup.py after Python's own flags, which ask for debug lines."""
    code = (
        "import json, sys; sys.path.insert(0, 'tools'); import build_extension\n"
        "print(json.dumps(build_extension.make(['one.cpp'], False, True, []).extra_compile_args['cxx']))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BOMKERN_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**clean, "BOMKERN_BUILD_CUDA": "0", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    flags = json.loads(done.stdout.splitlines()[-1])
    source, to = tmp_path / "one.cpp", tmp_path / "one.o"
    source.write_text("int one() { return 1; }")
    subprocess.run(["g++", "-g", *flags, "-c", str(source), "-o", str(to)], check=True)
    assert (b".debug_info" in to.read_bytes()) == lines


def environment_with(folder: Path, *options: str) -> tuple[Path, Path]:
    """Return the Python of a new virtual environment and its folder of packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", *options, str(folder)], check=True)
    python = folder / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return python, Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())


def put_torch(folder: Path, version: str = "2.12.0+cpu") -> None:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")


def ask_backend(python: Path, isolated: Path, kind: str = "editable", **env: str) -> subprocess.CompletedProcess[str]:
    """Ask for the backend's requirements as under pip's isolation.

    The process sees setuptools only, neither site-packages nor the user's folder.
    """
    packages = Path(setuptools.__file__).parent.parent
    isolated.mkdir(exist_ok=True)
    for name in ("setuptools", "_distutils_hack"):
        if not (isolated / name).exists():
            (isolated / name).symlink_to(packages / name)
    code = f"import build_backend; print(build_backend.get_requires_for_build_{kind}())"
    hidden = {"PYTHONPATH": f"{ROOT / 'tools'}{os.pathsep}{isolated}", "PYTHONNOUSERSITE": "1"}
    return subprocess.run(
        [str(python), "-S", "-c", code], env={**os.environ, **hidden, **env}, capture_output=True, text=True
    )


@pytest.mark.parametrize("where", ["nowhere", "own", "user", "path"])
def test_backend_asks_for_torch_only_where_there_is_none(where: str, tmp_path: Path) -> None:
    """torch may be in the environment, in the user's folder, or in a folder that a .pth file names."""
    python, own = environment_with(tmp_path / "venv", *["--system-site-packages"] * (where == "user"))
    user = tmp_path / "user" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    folder = {"own": own, "user": user, "path": tmp_path / "elsewhere", "nowhere": tmp_path / "unseen"}[where]
    put_torch(folder)
    if where == "path":
        (own / "elsewhere.pth").write_text(f"{folder}\n")
    done = ask_backend(python, tmp_path / "isolated", PYTHONUSERBASE=str(tmp_path / "user"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("['torch>=2.11']" if where == "nowhere" else "[]")


def test_backend_refuses_an_old_torch_before_it_is_taken_away(tmp_path: Path) -> None:
    python, own = environment_with(tmp_path / "venv")
    put_torch(own, "2.10.1+cu128")
    done = ask_backend(python, tmp_path / "isolated")
    assert done.returncode != 0 and done.stderr.count("\n") == 1
    assert "needs torch>=2.11" in done.stderr and "2.10.1+cu128" in done.stderr


def test_backend_asks_for_no_torch_where_nothing_is_compiled(tmp_path: Path) -> None:
    python, _ = environment_with(tmp_path / "venv")
    (tmp_path / "empty").mkdir()
    isolated, bare = tmp_path / "isolated", {"PATH": str(tmp_path / "empty")}
    assert ask_backend(python, isolated, **bare).stdout.strip() == "[]"
    some = {**bare, "CXX": sys.executable}  # any executable file
    assert ask_backend(python, isolated, **some).stdout.strip() == "['torch>=2.11']"
    assert ask_backend(python, isolated, "sdist", **some).stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["setup.py build", "tools/build_backend.py"])
def test_what_an_open_build_lacks_is_told_in_one_line(command: str, tmp_path: Path) -> None:
    """Without setuptools, the backend prints the line. With setuptools and a compiler but no torch, setup.py does."""
    packages = Path(setuptools.__file__).parent.parent
    if command.startswith("setup.py"):
        for name in ("setuptools", "_distutils_hack"):
            (tmp_path / name).symlink_to(packages / name)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'tools'}"}
    done = subprocess.run(
        [sys.executable, "-S", *command.split(" ")],
        cwd=ROOT,
        env={**environment, "CXX": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode and "Traceback" not in done.stderr and "leave --no-build-isolation out" in done.stderr


def test_archives_hold_what_they_should_and_are_the_same_when_built_again() -> None:
    """Build without a compiler, in seconds; `make dist-check` builds with one."""
    command = [sys.executable, "tools/check_dist.py", "--no-compiler"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_why_nothing_is_compiled_is_told_by_what_is_installed(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build",
            "--build-base",
            str(tmp_path / "temp"),
            "--build-lib",
            str(tmp_path),
        ],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path), "CXX": "nowhere"},
        check=True,
        capture_output=True,
    )
    # Remove the finder of an editable install, which would find the extension of the sources.
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f.__module__]; import bomkern"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "no C++ compiler was found; install g++" in done.stderr and "--force-reinstall" in done.stderr


def test_every_package_is_installed(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "BOMKERN_BUILD_CUDA": "", "PATH": str(tmp_path), "CXX": "nowhere"},
        check=True,
        capture_output=True,
    )
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "bomkern").rglob("*.py")}
    assert there and there <= {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")}


def test_an_extra_is_installed_with_those_inside_it_and_without_bomkern() -> None:
    import install

    wanted = install.requirements(["test"])
    assert len(wanted) == len(set(wanted)) and not any(name.startswith("bomkern") for name in wanted)
    assert {"pytest", "tqdm", "pytorch-lightning>=2.4"} <= set(wanted) and "mypy" not in wanted
    with pytest.raises(SystemExit, match="no extra is called 'tests'"):
        install.requirements(["tests"])


def test_a_build_shows_its_files_and_keeps_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import install

    pip = write_program(tmp_path / "pip", "echo '  bomkern: 1 of 2: csrc/one.cpp'; echo '  a warning'; exit $STATUS")
    monkeypatch.setattr(install, "PIP", [str(pip)])
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "LOG", tmp_path / "build" / "install.log")
    monkeypatch.setenv("STATUS", "0")
    assert install.build([]) == 0 and capfd.readouterr() == ("bomkern: 1 of 2: csrc/one.cpp\n", "")
    assert "a warning" in install.LOG.read_text()
    monkeypatch.setenv("STATUS", "3")
    assert install.build([]) == 3 and "a warning" in capfd.readouterr().err


def test_files_are_named_as_they_are_compiled(capfd: pytest.CaptureFixture[str]) -> None:
    with build_extension._a_line_for_each_file():
        subprocess.run(["echo", f"[3/42] c++ -O3 -c {ROOT}/csrc/min_goal.cpp -o x.o -g0\nan error"], check=True)
    assert capfd.readouterr().out == "bomkern: 3 of 42: csrc/min_goal.cpp\nan error\n"


def test_a_compilers_words_are_plain_text_in_the_library() -> None:
    said = build_extension.make(["one.cpp"], False, False, [], {"WHY": 'no "$x" in C:\\y'}).define_macros
    assert ("WHY", "\"no ''x' in C:'y\"") in said
