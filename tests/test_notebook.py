"""The tour is a clean, small notebook; that it runs is for `.ci/run` to see.

Its install cell is run here with pip replaced by a note of what it was asked: an installed JAX must
never change.
"""

import importlib.metadata
import subprocess
import tomllib
from pathlib import Path

import jax
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PATH = ROOT / "notebooks" / "00_tour.ipynb"
MOST_BYTES = 300_000


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def faults(notebook):
    """What a committed notebook must not hold."""
    for cell in code(notebook):
        text = repr(cell.outputs)
        if any(f"{mark}/" in text for mark in ("/home", "/root", "/tmp", "/work", "/usr")):
            yield f"cell {cell.id}: an absolute path"
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"cell {cell.id}: an error"


def test_it_is_valid_small_and_clean(notebook):
    nbformat.validate(notebook)
    assert PATH.stat().st_size < MOST_BYTES
    assert list(faults(notebook)) == []


def test_it_uses_only_what_is_public(notebook):
    lines = [line for cell in code(notebook) for line in cell.source.splitlines()]
    imported = [line for line in lines if line.startswith(("from effjax", "import effjax"))]
    assert len(imported) > 10
    assert not any("._" in line or "import _" in line for line in imported)


def test_its_address_is_the_projects(notebook):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project.get("urls", {}).get("Repository", "")
    assert f'REPOSITORY = "{address}"' in code(notebook)[0].source
    badge = any("colab.research.google.com" in cell.source for cell in notebook.cells)
    assert badge == bool(address)


class Pip:
    """Stands for subprocess.run: keeps the command and what its constraints file says."""

    def __init__(self, code):
        self.code, self.command, self.constraints = code, [], []

    def __call__(self, command, **_):
        self.command = command
        self.constraints = Path(command[command.index("-c") + 1]).read_text().splitlines()
        return subprocess.CompletedProcess(command, self.code, "", "conflicting dependencies")


def install(notebook, monkeypatch, folder, is_there, code_of_pip=0):
    """Runs the install cell in a folder, with effjax installed or not."""
    pip, version = Pip(code_of_pip), importlib.metadata.version

    def absent(name):
        if name == "effjax":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.chdir(folder)
    monkeypatch.setattr(subprocess, "run", pip)
    if not is_there:
        monkeypatch.setattr(importlib.metadata, "version", absent)
    exec(compile(code(notebook)[0].source, "install cell", "exec"), {})
    return pip


def test_an_installed_effjax_is_left_alone(notebook, monkeypatch):
    assert install(notebook, monkeypatch, ROOT, is_there=True).command == []


def test_installing_pins_every_part_of_jax(notebook, monkeypatch):
    pip = install(notebook, monkeypatch, ROOT / "notebooks", is_there=False)
    assert pip.command[1:4] == ["-m", "pip", "install"]
    assert pip.command[-1] == str(ROOT)
    assert "--upgrade" not in pip.command
    assert "-U" not in pip.command
    assert f"jax=={jax.__version__}" in pip.constraints
    assert f"jaxlib=={importlib.metadata.version('jaxlib')}" in pip.constraints
    assert not any(line.startswith("jaxtyping") for line in pip.constraints)


def test_a_refusal_of_pip_is_shown(notebook, monkeypatch):
    with pytest.raises(RuntimeError, match="installed nothing: conflicting dependencies"):
        install(notebook, monkeypatch, ROOT, is_there=False, code_of_pip=1)


def test_without_a_checkout_and_an_address_it_says_so(notebook, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="from a checkout"):
        install(notebook, monkeypatch, tmp_path, is_there=False)


def test_a_dirty_notebook_is_caught():
    output = nbformat.v4.new_output("stream", text="/home/me/effjax")
    error = nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])
    cells = [nbformat.v4.new_code_cell("1", outputs=[output, error])]
    assert len(list(faults(nbformat.v4.new_notebook(cells=cells)))) == 2
