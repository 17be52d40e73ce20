"""effjax: the survey you can run.

Efficient NLP methods in JAX as pure functions, weight types and transformations of parameter trees.
`effjax.einsum` and `effjax.take` are the two doors through which activations meet weights; every
room (`effjax.ops`, `effjax.models`, ...) is imported when it is first named.
"""

import importlib
from types import ModuleType

from effjax.weights import einsum, take

__version__ = "0.1.0"
__all__ = ["__version__", "einsum", "take"]

_ROOMS = (
    "config",
    "cost",
    "data",
    "errors",
    "evaluate",
    "inference",
    "models",
    "objectives",
    "ops",
    "parallel",
    "select",
    "training",
    "transforms",
    "weights",
)


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"effjax.{name}")
    raise AttributeError(
        f"module 'effjax' has no attribute {name!r}; its rooms: {', '.join(_ROOMS)}"
    )


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})
