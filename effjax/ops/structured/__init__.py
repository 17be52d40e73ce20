"""Structured matrices and transforms: Fourier mixing, and what projects matrices onto a structure.

The structures that a weight can have are leaves of `effjax.weights`; here are the matrices nearest
to a dense one, the transforms that they contain exactly, and mixing without weights.
"""
