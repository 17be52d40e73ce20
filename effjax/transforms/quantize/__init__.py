"""Quantisers: weights in few bits."""
