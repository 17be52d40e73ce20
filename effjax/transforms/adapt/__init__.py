"""Adapters: small trained updates beside frozen weights."""
