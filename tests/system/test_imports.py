"""What our code imports, and what the running processes have loaded."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernel", "ipc", "services", "drivers", "shell")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PROGRAMS = sorted((ROOT / "benchmarks").rglob("*.py"))
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", *PACKAGES}
NUMERICS = ("jax", "jaxlib", "flax", "orbax")
SERVICES = ("security", "memory", "scheduler", "models", "monitor", "gateway", "supervisor")

LOADED = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""
EVERYTHING = """
import importlib, json, pkgutil, sys, warnings
import llmos
warnings.simplefilter("ignore")
names = [m.name for m in pkgutil.walk_packages(llmos.__path__, "llmos.")]
for name in names:
    importlib.import_module(name)
print(json.dumps([names, sorted(sys.modules)]))
"""


def python(script: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=100, check=False,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def imported(path: Path) -> set[str]:
    """The first part of the name of every module that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", [*SOURCES, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_imports_pickle_or_a_bare_package(path: Path) -> None:
    assert imported(path) & FORBIDDEN == set()


def test_no_bare_module_is_loaded_when_everything_is_imported() -> None:
    names, loaded = python(EVERYTHING)
    assert {f"llmos.{package}" for package in PACKAGES} <= set(names)
    assert not {name for name in loaded if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize(
    "module",
    ["llmos.kernel.__main__", "llmos.ipc", "llmos.drivers.sdk.__main__", "llmos.drivers.null.driver",
     "llmos.shell.main", "llmos.shell.boot", "llmos.shell.generate",
     *(f"llmos.services.{name}.__main__" for name in SERVICES)],
)  # fmt: skip
def test_only_the_jax_driver_imports_jax(module: str) -> None:
    assert not {name for name in python(LOADED, module) if name.split(".")[0] in NUMERICS}


def test_no_source_but_the_jax_driver_names_jax() -> None:
    own = ROOT / "drivers" / "jax"
    others = [path for path in SOURCES if own not in path.parents]
    assert not [str(path) for path in others if imported(path) & {*NUMERICS}]


@pytest.mark.system
@pytest.mark.model
@pytest.mark.timeout(600)
def test_of_the_running_processes_only_the_driver_has_loaded_jax(up: Any) -> None:
    up.openai().chat.completions.create(
        model="smollm2-135m-instruct", max_tokens=4, messages=[{"role": "user", "content": "Hi"}]
    )
    loaded = {
        process.name: "/jaxlib/" in Path(f"/proc/{process.pid}/maps").read_text()
        for process in up.status().processes
    }
    assert [name for name, has in loaded.items() if has] == ["driver.jax0"]


def test_the_kernel_can_be_read_in_one_sitting() -> None:
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "kernel").glob("*.py")) < 1000
