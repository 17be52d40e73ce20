"""Pruners: weights with zeros."""
