"""Soft-max attention: patterns, one blockwise engine, its naive form and what it costs."""
