"""The house stands as designed: imports, names, forbidden calls and sources, read with `ast`.

Each rule is a function from a file to its violations, tried on this repository and on a planted
file that breaks it.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from effjax import methods

ROOT = Path(__file__).parent.parent

# Who stands on which floor; a room imports only from what its row of DESIGN's table names.
FLOORS = {
    "kernels": 0, "cost": 0, "weights": 1, "ops": 2, "models": 3, "objectives": 3,
    "transforms": 3, "data": 4, "parallel": 4, "training": 5, "inference": 5, "retrieval": 6,
    "prompting": 6, "evaluate": 7, "select": 8,
}  # fmt: skip


def below(floor: int) -> set[str]:
    return {room for room, at in FLOORS.items() if at < floor}


# errors and config stand under everything but the kernels, which stand alone.
GROUND = {"errors", "config"}
MAY_IMPORT = {
    "kernels": set(),
    "errors": set(),
    "config": {"errors"},
    "cost": GROUND,
    "weights": {"kernels"} | GROUND,
    "ops": {"kernels", "weights"} | GROUND,
    "models": {"ops", "weights"} | GROUND,
    "objectives": {"ops", "weights"} | GROUND,
    "transforms": {"ops", "weights", "cost"} | GROUND,
    "data": {"ops", "objectives", "weights"} | GROUND,
    "parallel": {"ops", "weights", "cost"} | GROUND,
    **{room: below(FLOORS[room]) | GROUND for room in FLOORS if FLOORS[room] >= 5},
    # Modules beside the rooms.
    "effjax": {"weights"},
    "methods": {"errors"},
    "doctor": {"cost", "kernels", "errors"},
    "__main__": {"doctor", "methods", "errors", "inference"},
}
DOORS = {"einsum": "weights", "take": "weights", "__version__": None}

# Packages besides the standard library, for the rooms that stand alone.
OUTSIDE = {
    "kernels": {"jax", "numpy"},
    "cost": {"jax", "numpy"},
    "errors": set(),
    "config": {"numpy", "tyro"},
    "methods": set(),
}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "misc", "core", "base", "lib"}
FORBIDDEN_IMPORTS = {
    "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "yaml",
}  # fmt: skip
DYNAMIC = {"importlib.import_module", "__import__"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen"}
SOURCED = {"ops", "objectives", "transforms"}


class File(NamedTuple):
    """A source file, parsed, with the room it belongs to."""

    path: Path  # from the repository's root
    tree: ast.Module

    @classmethod
    def of(cls, path: str, source: str) -> "File":
        return cls(Path(path), ast.parse(source))

    @property
    def module(self) -> tuple[str, ...]:
        """The dotted module name, as parts."""
        parts = self.path.with_suffix("").parts
        parts = parts[1:] if parts[0] == "kernels" else parts
        return parts[:-1] if parts[-1] == "__init__" else parts

    @property
    def room(self) -> str:
        return room_of(".".join(self.module)) or "effjax"


def room_of(dotted: str) -> str | None:
    """The room that a module of this project lies in; None for a module of others."""
    first, _, rest = dotted.partition(".")
    if first == "effjax_kernels":
        return "kernels"
    if first == "experiments":
        return "experiments"
    return (rest.split(".")[0] or "effjax") if first == "effjax" else None


def imported_from(file: File) -> Iterator[tuple[int, str, str]]:
    """Line, absolute module and name of each `from module import name`."""
    package = file.module if file.path.name == "__init__.py" else file.module[:-1]
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, base, alias.name) for alias in node.names)


def imported(file: File) -> Iterator[tuple[int, str]]:
    """Line and absolute module of everything a file imports, at any depth and by any means."""
    for line, base, name in imported_from(file):
        yield line, f"effjax.{name}" if base == "effjax" else base
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in DYNAMIC:
            texts = [argument for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from ((node.lineno, str(text.value)) for text in texts)


def called(node: ast.Call) -> str:
    """The dotted name of what a call calls, as far as it is one."""
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def floors(file: File) -> Iterator[str]:
    """Imports that the table does not allow."""
    if file.room == "experiments":
        return
    allowed = {*MAY_IMPORT.get(file.room, set()), file.room}
    for line, dotted in imported(file):
        room = room_of(dotted)
        door = dotted.removeprefix("effjax.")
        if door in DOORS:
            room = DOORS[door]
        if room == "effjax" and file.room != "effjax":
            yield f"{file.path}:{line}: names the room that it imports, not the whole of effjax"
        elif room is not None and room not in allowed:
            yield f"{file.path}:{line}: {file.room} may not import {room}"


def outside(file: File) -> Iterator[str]:
    """Third-party imports of rooms that stand alone, and Flax outside models."""
    for line, dotted in imported(file):
        package = dotted.split(".")[0]
        if package == "flax" and file.room not in ("models", "experiments"):
            yield f"{file.path}:{line}: only models imports flax"
        wanted = OUTSIDE.get(file.room)
        if wanted is None or room_of(dotted) or package in sys.stdlib_module_names:
            continue
        if package not in wanted:
            yield f"{file.path}:{line}: {file.room} may not import {package}"


def names(file: File) -> Iterator[str]:
    """Files and folders whose name says nothing."""
    for part in file.path.with_suffix("").parts:
        if part in FORBIDDEN_NAMES:
            yield f"{file.path}: {part} is no name for an idea"


def calls(file: File) -> Iterator[str]:
    """Ways to run text or a stranger's bytes as code."""
    for line, dotted in imported(file):
        if dotted.split(".")[0] in FORBIDDEN_IMPORTS:
            yield f"{file.path}:{line}: imports {dotted}"
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call):
            continue
        if called(node) in FORBIDDEN_CALLS:
            yield f"{file.path}:{node.lineno}: calls {called(node)}"
        for keyword in node.keywords:
            on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            if keyword.arg in ("shell", "allow_pickle") and on:
                yield f"{file.path}:{node.lineno}: calls with {keyword.arg}=True"


def sources(file: File, used: set[str] | None = None) -> Iterator[str]:
    """Functions of the rooms of methods that do not say where their mathematics is from.

    `used` are the dotted names that reach beyond a room; None takes every public function for one.
    """
    if file.room not in SOURCED:
        return
    for node in file.tree.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        dotted = ".".join([*file.module, node.name])
        lines = (ast.get_docstring(node) or "").splitlines()
        if (used is None or dotted in used) and not any(x.startswith("Source:") for x in lines):
            yield f"{file.path}:{node.lineno}: {node.name} has no line that begins 'Source:'"


def reaching(files: list[File]) -> set[str]:
    """Names that leave their room: imported by another, offered by its package, or in the index.

    The rest is plumbing between the files of one room; a paper for padding an axis would be noise.
    """
    names = {row.home for row in methods.read()}
    for file in files:
        for _, base, name in imported_from(file):
            if room_of(base) != file.room or file.path.name == "__init__.py":
                names.add(f"{base}.{name}")
    return names


def long(file: File) -> Iterator[str]:
    """Functions and files longer than the style asks for: 40 and 400 lines, kernels 80 and 600."""
    most, all_ = (80, 600) if file.room == "kernels" else (40, 400)
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            start = (docstring.end_lineno if docstring else node.lineno) or node.lineno
            size = (node.end_lineno or start) - start
            if size > most:
                yield f"{file.path}:{node.lineno}: {node.name} has {size} lines under its docstring"
    size = max((getattr(node, "end_lineno", 0) for node in file.tree.body), default=0)
    if size > all_:
        yield f"{file.path}: {size} lines"


RULES = {rule.__name__: rule for rule in (floors, outside, names, calls, sources)}


@pytest.fixture(scope="module")
def files():
    paths = [
        path
        for folder in ("effjax", "kernels", "experiments")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    return [File.of(str(path.relative_to(ROOT)), path.read_text()) for path in paths]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_follows(rule, files):
    extra = {"used": reaching(files)} if rule == "sources" else {}
    faults = [fault for file in files for fault in RULES[rule](file, **extra)]
    assert not faults, "\n".join(faults)


def test_what_reaches_beyond_a_room_is_known():
    lines = {
        "effjax/models/a.py": "from effjax.ops.x.a import f",
        "effjax/ops/__init__.py": "from effjax.ops.x.a import g",
        "effjax/ops/b.py": "from effjax.ops.x.a import h",
    }
    names = reaching([File.of(path, line) for path, line in lines.items()])
    assert {"effjax.ops.x.a.f", "effjax.ops.x.a.g"} <= names
    assert "effjax.ops.x.a.h" not in names


def test_every_room_has_its_row(files):
    rooms = {file.room for file in files} - {"experiments"}
    assert rooms <= set(MAY_IMPORT), "a room without a row in DESIGN's table"


def test_a_floor_never_imports_the_floor_above():
    for room, floor in FLOORS.items():
        assert all(FLOORS.get(other, -1) < floor for other in MAY_IMPORT[room] - GROUND)


def test_long_functions_and_files_are_listed(files):
    """A list to look at, with `pytest -rP`; the style says 'about', so length fails nothing."""
    print("\n".join(fault for file in files for fault in long(file)))


@pytest.mark.parametrize(
    ("rule", "path", "source", "words"),
    [
        ("floors", "effjax/ops/a.py", "from effjax.models import x", "ops may not import models"),
        ("floors", "effjax/ops/a.py", "def f():\n  import effjax.training.loop", "import training"),
        ("floors", "effjax/ops/x/a.py", "from ...models.layers import Dense", "import models"),
        ("floors", "effjax/ops/x/__init__.py", "from ... import models", "import models"),
        ("floors", "effjax/models/a.py", "import effjax_kernels.rms_norm", "import kernels"),
        ("floors", "effjax/cost/a.py", "from effjax import einsum", "cost may not import weights"),
        ("floors", "effjax/cost/a.py", "import effjax", "not the whole of effjax"),
        ("floors", "effjax/training/a.py", "from effjax.inference import x", "import inference"),
        ("floors", "effjax/data/a.py", "importlib.import_module('effjax.cost')", "import cost"),
        ("floors", "effjax/weights/a.py", "import experiments.compare", "import experiments"),
        ("floors", "kernels/effjax_kernels/a/gpu.py", "from effjax.errors import near", "errors"),
        ("outside", "effjax/ops/a.py", "from flax import nnx", "only models imports flax"),
        ("outside", "effjax/cost/a.py", "import optax", "cost may not import optax"),
        ("outside", "kernels/effjax_kernels/a/gpu.py", "import einops", "may not import einops"),
        ("outside", "effjax/errors.py", "import jax", "errors may not import jax"),
        ("names", "effjax/ops/utils.py", "", "utils is no name"),
        ("names", "effjax/common/a.py", "", "common is no name"),
        ("calls", "effjax/ops/a.py", "eval('1')", "calls eval"),
        ("calls", "effjax/ops/a.py", "exec('1')", "calls exec"),
        ("calls", "effjax/ops/a.py", "import os\nos.system('ls')", "calls os.system"),
        ("calls", "effjax/ops/a.py", "def f():\n    import pickle", "imports pickle"),
        ("calls", "experiments/a.py", "from yaml import safe_load", "imports yaml"),
        ("calls", "effjax/ops/a.py", "run('ls', shell=True)", "shell=True"),
        ("calls", "effjax/ops/a.py", "np.load(f, allow_pickle=True)", "allow_pickle=True"),
        ("sources", "effjax/ops/a.py", "def f():\n    'Does.'", "f has no line that begins"),
        ("sources", "effjax/transforms/x/a.py", "def f():\n    pass", "f has no line"),
    ],
)  # fmt: skip
def test_a_planted_violation_is_caught(rule, path, source, words):
    faults = list(RULES[rule](File.of(path, source)))
    assert len(faults) == 1
    assert words in faults[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("effjax/ops/a.py", "from effjax import einsum\nfrom effjax.errors import ConfigError"),
        ("effjax/ops/x/a.py", "from ..position.rope import rope\nfrom . import b"),
        ("effjax/models/a.py", "from flax import nnx\nimport effjax.ops.position"),
        ("effjax/select/a.py", "from effjax.evaluate import record\nfrom effjax.cost import flops"),
        ("experiments/a.py", "import effjax\nfrom effjax.training import loop"),
        ("effjax/ops/a.py", "def f():\n    '''Does.\n\n    Source: a paper\n    '''"),
        ("effjax/ops/a.py", "def _f():\n    pass\nclass A:\n    def g(self): pass"),
        ("effjax/cost/a.py", "import math\nimport jax.numpy\nimport numpy\nmodel.eval()"),
        ("effjax/transforms/a.py", "run('ls', shell=False)"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert [fault for rule in RULES.values() for fault in rule(File.of(path, source))] == []


def test_long_is_caught():
    body = "\n".join(f"    x{i} = {i}" for i in range(41))
    assert len(list(long(File.of("effjax/ops/a.py", f"def f():\n{body}\n")))) == 1
    assert list(long(File.of("kernels/effjax_kernels/a/gpu.py", f"def f():\n{body}\n"))) == []
    many = "\n".join(f"x{i} = {i}" for i in range(401))
    assert len(list(long(File.of("effjax/ops/a.py", many)))) == 1
    documented = f"def f():\n    '''{body}\n    '''\n    return 1\n"
    assert list(long(File.of("effjax/ops/a.py", documented))) == []
