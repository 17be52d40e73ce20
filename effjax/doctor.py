"""The doctor's page: what this machine has, what it can do, and what is wrong with it."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from effjax.cost.memory import device_memory
from effjax.cost.peaks import peaks

PACKAGES = ("effjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# Packages that load machine code into JAX and must have its version.
_PLUGIN = re.compile(r"jax-(cuda\d+|rocm\d+)-(plugin|pjrt)")

# What JAX raises when the platform asked for is not there.
_NO_BACKEND = (AssertionError, RuntimeError, ValueError)

# With huge pages and high thresholds, glibc keeps XLA's buffers instead of giving them back and
# paying for the page faults again at every step.
MALLOC = (
    "GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_MMAP_THRESHOLD_=8589934592 "
    "MALLOC_TRIM_THRESHOLD_=17179869184"
)


class Section(NamedTuple):
    """A heading with its lines, each a label and a text."""

    title: str
    lines: list[tuple[str, str]]


def examine(measure: bool = True) -> list[Section]:
    """Looks the machine over. `measure=False` leaves out the two seconds of measured peaks."""
    installed = versions()
    sections = [
        Section("machine", _machine()),
        Section("versions", [(name, installed.get(name, "not installed")) for name in PACKAGES]),
    ]
    devices, failure = _devices()
    sections.append(Section("devices", devices))
    if measure and failure is None:
        sections.append(Section("measured peak of one device", _peaks()))
    sections += [
        Section("extras", _extras(installed)),
        Section("kernels", kernels()),
        Section("environment", _environment()),
    ]
    found = mismatches(installed)
    problems = [*found, failure] if failure else found
    sections.append(Section("problems", [("-", text) for text in problems] or [("none", "")]))
    return sections


def plain(sections: list[Section]) -> str:
    """Lays the sections out as text, one fact a line."""
    page = []
    for section in sections:
        page.append(section.title)
        width = max((len(label) for label, _ in section.lines), default=0)
        page += [f"  {label:<{width}}  {text}".rstrip() for label, text in section.lines]
    return "\n".join(page)


def versions() -> dict[str, str]:
    """Reads the versions of all installed distributions, without importing any."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed package has none
            found[_normal(name)] = distribution.version
    return found


def mismatches(installed: Mapping[str, str]) -> list[str]:
    """Names the plugins that do not fit the installed JAX, and why; empty when all do."""
    problems = []
    wanted = installed.get("jax", "")
    names = [name for name in sorted(installed) if _PLUGIN.fullmatch(name)]
    for name in ["jaxlib", *names]:
        got = installed.get(name)
        if got is not None and _release(got) != _release(wanted):
            problems.append(
                f"{name} {got} does not fit jax {wanted}: pip install {name}=={_base(wanted)}"
            )
    toolkits = sorted({m[1] for name in names if (m := _PLUGIN.fullmatch(name))})
    if len(toolkits) > 1:
        problems.append(f"plugins for {' and '.join(toolkits)} are both installed: keep one")
    if "jax-metal" in installed:
        problems.append("jax-metal is installed: it stopped at JAX 0.4 and breaks newer ones")
    return problems


def kernels() -> list[tuple[str, str]]:
    """Lists the kernels: what each is written for, and what `implementation=None` takes here."""
    spec = importlib.util.find_spec("effjax_kernels")
    if spec is None or not spec.submodule_search_locations:
        return [("none", "effjax_kernels is not installed")]
    lines = []
    for folder in sorted(Path(spec.submodule_search_locations[0]).iterdir()):
        written = [kind for kind in ("gpu", "tpu") if (folder / f"{kind}.py").exists()]
        if written:
            names = ", ".join(f"pallas_{kind}" for kind in written)
            usable = [kind for kind in written if kind == _backend()]
            here = f"pallas_{usable[0]} where its tiles fit, else xla" if usable else "xla"
            lines.append((folder.name, f"{names}; here: {here}"))
    return lines or [("none", "")]


def _machine() -> list[tuple[str, str]]:
    lines = [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("cores", _cores()),
    ]
    total, free = _memory()
    lines.append(("memory", f"{_gib(total)}, {_gib(free)} free"))
    return lines


def _cores() -> str:
    count = os.cpu_count() or 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    return f"{count}" if usable == count else f"{usable} of {count}"


def _memory() -> tuple[int | None, int | None]:
    """Bytes of main memory and those free for use."""
    try:
        text = Path("/proc/meminfo").read_text()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines()}
        return sizes.get("MemTotal"), sizes.get("MemAvailable")
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    except (AttributeError, OSError, ValueError):
        return None, None


def _devices() -> tuple[list[tuple[str, str]], str | None]:
    """Lines on the local devices, and what is wrong where JAX starts none."""
    try:
        devices = jax.local_devices()
    except _NO_BACKEND as error:
        reason = (str(error).splitlines() or ["no platform was found"])[0]
        setting = os.environ.get("JAX_PLATFORMS", "")
        return [("none", "")], f"JAX starts no device (JAX_PLATFORMS={setting!r}): {reason}"
    lines = []
    for device in devices:
        limit = device_memory(device).limit
        held = f", {_gib(limit)} for arrays" if limit else ""
        lines.append((f"{device.platform}:{device.id}", f"{device.device_kind}{held}"))
    return lines, None


def _backend() -> str | None:
    try:
        return jax.default_backend()
    except _NO_BACKEND:
        return None


def _peaks() -> list[tuple[str, str]]:
    measured = peaks()
    return [
        ("matmul float32", f"{measured.matmul_float32 / 1e9:,.0f} GFLOP/s"),
        ("matmul bfloat16", f"{measured.matmul_bfloat16 / 1e9:,.0f} GFLOP/s"),
        ("copy in place", f"{measured.copy / 1e9:,.0f} GB/s"),
        ("read", f"{measured.read / 1e9:,.0f} GB/s"),
    ]


def _extras(installed: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each extra of the package, whole or with what it lacks."""
    try:
        required = importlib.metadata.requires("effjax") or []
    except importlib.metadata.PackageNotFoundError:
        return [("unknown", "effjax is not installed: pip install -e .")]
    lacks: dict[str, list[str]] = {}
    for requirement in required:
        if extra := re.search(r"extra == ['\"]([^'\"]+)['\"]", requirement):
            name = _normal(re.split(r"[^A-Za-z0-9._-]", requirement.strip())[0])
            missing = lacks.setdefault(extra[1], [])
            if name not in installed:
                missing.append(name)
    return [
        (extra, f"lacks {', '.join(missing)}: pip install 'effjax[{extra}]'" if missing else "all")
        for extra, missing in sorted(lacks.items())
    ] or [("none", "")]


def _environment() -> list[tuple[str, str]]:
    """Settings that make runs faster, as lines to paste; nothing is set for the user."""
    cache = getattr(jax.config, "jax_compilation_cache_dir", None)
    hint = "off; to compile once: export JAX_COMPILATION_CACHE_DIR=~/.cache/jax"
    lines = [("compilation cache", cache or hint)]
    if sys.platform == "linux" and _backend() == "cpu":
        on = "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")
        lines.append(("huge pages", "on" if on else f"off; to train faster: {MALLOC} python ..."))
    return lines


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _base(version: str) -> str:
    return ".".join(map(str, _release(version)))


def _release(version: str) -> tuple[int, ...]:
    """The first three numbers: a plugin fits all patches packaged after them."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")[:3]) if numbers else ()
