"""Factorisers: weights as products of smaller ones."""
