"""The doctor's page and the command line around it."""

import importlib.metadata
import subprocess
import sys

import pytest

from effjax import __main__ as command
from effjax import doctor, methods
from effjax.cost.peaks import Peaks

MEASURED = Peaks("cpu cpu", 2e11, 4e11, 5e10, 3e10)


@pytest.fixture
def page(monkeypatch):
    monkeypatch.setattr(doctor, "peaks", lambda: MEASURED)
    return doctor.plain(doctor.examine())


def test_the_page_says_what_the_machine_has(page):
    for fact in ("python", "cores", "memory", "GiB", "jaxlib", "cpu:7", "rms_norm", "problems"):
        assert fact in page
    assert "200 GFLOP/s" in page
    assert "50 GB/s" in page
    assert importlib.metadata.version("jax") in page
    assert all(line == line.rstrip() for line in page.splitlines())


def test_the_page_gives_lines_to_paste(page, monkeypatch):
    assert "JAX_COMPILATION_CACHE_DIR" in page or "compilation cache" in page
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert ("huge pages", "on") in doctor._environment()
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert doctor.MALLOC in dict(doctor._environment())["huge pages"]


def test_without_a_device_the_page_still_comes(monkeypatch):
    def fails():
        raise AssertionError

    monkeypatch.setattr(doctor.jax, "local_devices", fails)
    monkeypatch.setattr(doctor.jax, "default_backend", fails)
    page = doctor.plain(doctor.examine())
    assert "JAX starts no device" in page
    assert "GFLOP/s" not in page


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ({"jax": "0.12.0.1", "jaxlib": "0.12.0", "jax-cuda12-plugin": "0.12.0"}, []),
        ({"jax": "0.10.2", "jaxlib": "0.10.2"}, []),
        (
            {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.9.1"},
            ["jax-cuda12-plugin 0.9.1", "jax 0.10.2", "pip install jax-cuda12-plugin==0.10.2"],
        ),
        ({"jax": "0.10.2", "jaxlib": "0.9.0"}, ["jaxlib 0.9.0"]),
        (
            {"jax": "0.10.2", "jax-cuda12-pjrt": "0.10.2", "jax-cuda13-pjrt": "0.10.2"},
            ["cuda12 and cuda13"],
        ),
        ({"jax": "0.10.2", "jax-metal": "0.1.1"}, ["jax-metal"]),
        ({"jax": "0.10.2", "jax-rocm7-plugin": "0.10.1"}, ["jax-rocm7-plugin"]),
    ],
)
def test_plugins_that_do_not_fit_are_named(installed, words):
    problems = " ".join(doctor.mismatches(installed))
    assert bool(problems) == bool(words)
    assert all(word in problems for word in words)


def test_extras_say_what_they_lack(monkeypatch):
    requires = ['Foo_Bar>=1; extra == "dev"', 'numpy>=1; extra == "dev"', 'numpy; extra == "io"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: requires)
    lines = dict(doctor._extras({"numpy": "2"}))
    assert lines == {"dev": "lacks foo-bar: pip install 'effjax[dev]'", "io": "all"}

    def missing(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.importlib.metadata, "requires", missing)
    assert "not installed" in doctor._extras({})[0][1]


def test_kernels_are_what_lies_in_their_folders(monkeypatch):
    assert dict(doctor.kernels())["rms_norm"].endswith("here: xla")
    monkeypatch.setattr(doctor.jax, "default_backend", lambda: "gpu")
    assert "here: pallas_gpu" in dict(doctor.kernels())["rms_norm"]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    assert "not installed" in doctor.kernels()[0][1]


def test_the_command_prints_the_page(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "peaks", lambda: MEASURED)
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("effjax ")
    assert "\x1b" not in printed


def test_on_a_terminal_the_page_is_styled_and_brackets_are_kept(monkeypatch, capsys):
    sections = [doctor.Section("extras", [("dev", "pip install 'effjax[dev]'")])]
    monkeypatch.setattr(doctor, "examine", lambda: sections)
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: True, raising=False)
    assert command.main(["doctor"]) == 0
    assert "effjax[dev]" in capsys.readouterr().out


ROW = methods.Row("EVAL-06", "FLOPs", "-", "effjax.cost.flops.count", "tests/x.py", "", "works")


@pytest.mark.parametrize("terminal", [False, True])
def test_the_index_prints_what_is_found(monkeypatch, capsys, terminal):
    monkeypatch.setattr(methods, "read", lambda: (ROW,))
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: terminal, raising=False)
    assert command.main(["methods", "flops", "eval"]) == 0
    printed = capsys.readouterr().out
    assert "EVAL-06" in printed
    assert "works" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["metods"], "did you mean 'methods'"),
        (["--doctor"], "did you mean 'doctor'"),
        (["zzz"], "wanted doctor or methods"),
        (["doctor", "now"], "takes no arguments"),
        (["methods", "flips"], "did you mean 'flops'"),
    ],
)
def test_what_is_not_known_exits_2_with_the_nearest_name(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(methods, "read", lambda: (ROW,))
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_help(capsys):
    assert command.main(["--help"]) == 0
    assert "methods [words]" in capsys.readouterr().out


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "effjax", "metods"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: unknown command 'metods', wanted doctor or methods; did you mean 'methods'?\n"
    )
