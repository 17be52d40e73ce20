"""Pallas kernels, a package each. They import jax alone and know nothing of effjax."""
