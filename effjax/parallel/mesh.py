"""The device mesh: a grid of devices with one axis for each way of splitting the work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

from effjax.config import require_types
from effjax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices stand along each axis; their product is the number of devices.

    data: copies of the parameters, each with its own part of the batch.
    fsdp: parts of the batch among which the parameters are divided too (fully sharded).
    tensor: parts of each matrix product (heads, hidden units, vocabulary, experts).
    One of them may be -1: whatever is left.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        require_types(self)
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and size != -1:
                raise ConfigError(f"MeshConfig.{name} must be at least 1, or -1, got {size}")
        free = [name for name in AXES if getattr(self, name) == -1]
        if len(free) > 1:
            raise ConfigError(f"MeshConfig can have one axis of -1, got {' and '.join(free)}")

    def sizes(self, devices: int) -> tuple[int, ...]:
        """The size of each of `AXES` on so many devices.

        Raises ConfigError with the arithmetic and the nearest meshes that fit.
        """
        asked = tuple(getattr(self, name) for name in AXES)
        fixed = math.prod(size for size in asked if size != -1)
        found = tuple(max(devices // fixed, 1) if size == -1 else size for size in asked)
        if math.prod(found) == devices:
            return found
        product = " x ".join(f"{n}={s}" for n, s in zip(AXES, asked, strict=True) if s != -1)
        verb = "does not divide" if -1 in asked else "is not"
        raise ConfigError(
            f"mesh {product} = {fixed}, which {verb} the {devices} devices; "
            f"nearest: {' or '.join(_nearest(found, devices))}"
        )


def _nearest(wanted: tuple[int, ...], devices: int) -> list[str]:
    """The two meshes of so many devices whose axes differ from `wanted` by the smallest factors."""

    def distance(mesh: tuple[int, ...]) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(mesh, wanted, strict=True))

    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    pairs = [(f, t) for f in divisors for t in divisors if devices % (f * t) == 0]
    meshes = sorted(((devices // (f * t), f, t) for f, t in pairs), key=distance)
    return [" ".join(f"{n}={s}" for n, s in zip(AXES, mesh, strict=True)) for mesh in meshes[:2]]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the given devices (all of them by default), its axes as `config` says.

    Its axes are Auto: the compiler propagates shardings and places the collectives, so that a
    model needs to know nothing of the mesh.

    Raises ConfigError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
