"""What the kernels take; everything else is refused before anything is traced."""

import jax


def require(x: jax.Array, scale: jax.Array, *, dtypes: tuple[str, ...], widest: int) -> None:
    """Raises NotImplementedError unless x is [..., D], scale [D], of these dtypes and sizes."""
    for name, array in (("x", x), ("scale", scale)):
        if array.dtype not in dtypes:
            raise NotImplementedError(f"needs {name} of {' or '.join(dtypes)}, got {array.dtype}")
    if scale.shape != x.shape[-1:]:
        raise NotImplementedError(f"needs scale of shape {x.shape[-1:]}, got {scale.shape}")
    if x.size == 0:
        raise NotImplementedError(f"needs at least one row and column, got shape {x.shape}")
    if x.shape[-1] > widest:
        raise NotImplementedError(f"needs width at most {widest}, got {x.shape[-1]}")
