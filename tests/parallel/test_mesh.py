"""A mesh is refused with its arithmetic, before anything is compiled, or fits the devices."""

import jax
import pytest
from jax.sharding import AxisType

from effjax.errors import ConfigError
from effjax.parallel import AXES, MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, tensor=-1), (2, 1, 4)),
        (MeshConfig(1, -1, 2), (1, 4, 2)),
        (MeshConfig(2, 2, 2), (2, 2, 2)),
    ],
)
def test_the_free_axis_takes_what_is_left(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape.values()) == sizes
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices())


def test_some_of_the_devices():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1
    assert make_mesh(MeshConfig(tensor=2), jax.devices()[2:8]).shape["data"] == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": 0}, r"MeshConfig.data must be at least 1, or -1, got 0"),
        ({"fsdp": -2}, r"MeshConfig.fsdp must be at least 1, or -1, got -2"),
        ({"fsdp": -1}, r"one axis of -1, got data and fsdp"),
        ({"tensor": 2.5}, r"MeshConfig.tensor"),
    ],
)
def test_a_bad_size_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        MeshConfig(**fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MeshConfig(tensor=3),
            "mesh fsdp=1 x tensor=3 = 3, which does not divide the 8 devices; "
            "nearest: data=2 fsdp=1 tensor=4 or data=4 fsdp=1 tensor=2",
        ),
        (
            MeshConfig(data=3, tensor=2),
            "mesh data=3 x fsdp=1 x tensor=2 = 6, which is not the 8 devices; "
            "nearest: data=4 fsdp=1 tensor=2",
        ),
        (MeshConfig(fsdp=16), "nearest: data=1 fsdp=8 tensor=1"),
        (MeshConfig(data=4), "mesh data=4 x fsdp=1 x tensor=1 = 4, which is not the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_names_the_nearest_that_do(config, message):
    with pytest.raises(ConfigError) as refusal:
        make_mesh(config)
    assert message in str(refusal.value)
