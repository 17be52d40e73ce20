"""Feed-forward networks by the name a config gives them: `network(x, context) -> (y, aux)`."""

from effjax.models.feedforwards.dense import DenseFeedForward
from effjax.models.feedforwards.switch import Switch

FEEDFORWARDS = {"dense": DenseFeedForward, "switch": Switch}

__all__ = ["FEEDFORWARDS", "DenseFeedForward", "Switch"]
