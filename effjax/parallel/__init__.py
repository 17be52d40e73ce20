"""Many devices: the mesh, the rules that divide named axes over it, and where each array lies."""

from effjax.parallel.mesh import AXES, MeshConfig, make_mesh
from effjax.parallel.rules import DEFAULT, Rules, override
from effjax.parallel.shard import (
    batch_sharding,
    replicated,
    shard,
    shard_batch,
    shardings,
    state_shardings,
)

__all__ = [
    "AXES",
    "DEFAULT",
    "MeshConfig",
    "Rules",
    "batch_sharding",
    "make_mesh",
    "override",
    "replicated",
    "shard",
    "shard_batch",
    "shardings",
    "state_shardings",
]
