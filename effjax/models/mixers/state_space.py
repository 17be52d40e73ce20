"""A diagonal state space per channel, followed by a gated linear unit across channels."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.models.configs import DecoderConfig
from effjax.models.context import Context
from effjax.models.layers import Dense
from effjax.ops.recurrence.state_space import diagonal_state_space
from effjax.weights import Axes, Tree
