"""`import effjax` is quiet: no heavy package, no device, no file written, no connection."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import effjax

HEAVY = ("flax", "orbax", "tensorflow_datasets", "matplotlib")
TOP_LEVEL = {"config", "errors"}  # reached like rooms, though they are files
ROOMS = {p.parent.name for p in Path(effjax.__file__).parent.glob("*/__init__.py")} | TOP_LEVEL

# Runs in a fresh interpreter: the hook sees everything from before the first import.
SCRIPT = """
import importlib, json, os, sys

seen = []
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")

def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & WRITE
        if writes and path != os.devnull:
            seen.append(f"open {path}")
    elif event in CHANGES or event.startswith("shutil."):
        seen.append(f"{event} {arguments[0]}")
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen",
                   "os.system", "os.fork", "os.exec", "os.posix_spawn", "urllib.Request"):
        seen.append(event)

sys.addaudithook(hook)

def state():
    # Not imported for the question: a package that never touched JAX started no backend.
    bridge = sys.modules.get("jax._src.xla_bridge")
    return {
        "modules": sorted(sys.modules),
        "devices": bool(bridge and bridge.backends_are_initialized()),
        "seen": list(seen),
    }

name, *rooms = sys.argv[1:]
package = importlib.import_module(name)
report = {"imported": state()}
report["rooms"] = {}
for room in rooms:
    try:
        report["rooms"][room] = getattr(package, room).__name__
    except Exception as error:  # one broken room is one failure
        report["rooms"][room] = repr(error)
report["resolved"] = state()
sys.stdout.write(json.dumps(report))
"""


def fresh(name, *rooms, folder=None):
    """What an interpreter looks like after importing a package, and after naming its rooms."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", SCRIPT, name, *rooms],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report():
    return fresh("effjax", *sorted(ROOMS))


def loaded(state, packages):
    return sorted(set(packages) & {name.split(".")[0] for name in state["modules"]})


def test_no_heavy_package_is_loaded(report):
    assert loaded(report["imported"], HEAVY) == []


def test_no_device_starts(report):
    assert not report["imported"]["devices"]
    assert not report["resolved"]["devices"]


def test_nothing_is_written_and_nobody_is_called(report):
    assert report["imported"]["seen"] == []


def test_rooms_come_when_they_are_named(report):
    there = set(report["imported"]["modules"])
    eager = {room for room in ROOMS if f"effjax.{room}" in there}
    assert eager <= {"weights", "errors", "config"}
    assert report["rooms"] == {room: f"effjax.{room}" for room in ROOMS}
    assert loaded(report["resolved"], ("tensorflow_datasets", "matplotlib")) == []


def test_dir_lists_the_rooms_and_a_wrong_name_says_so():
    assert set(dir(effjax)) >= ROOMS
    with pytest.raises(AttributeError, match="its rooms"):
        _ = effjax.no_such_room


LOUD = """
import socket, matplotlib, jax
open("left_behind.txt", "w").close()
try:
    socket.create_connection(("127.0.0.1", 9), timeout=0.1)
except OSError:
    pass
jax.devices()
"""


def test_a_loud_package_is_caught(tmp_path):
    """It does everything that is forbidden."""
    (tmp_path / "loud.py").write_text(LOUD)
    state = fresh("loud", folder=tmp_path)["imported"]
    assert loaded(state, HEAVY) == ["matplotlib"]
    assert state["devices"]
    assert "open left_behind.txt" in state["seen"]
    assert "socket.connect" in state["seen"]
