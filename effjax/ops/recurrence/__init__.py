"""Recurrences: memories of fixed size that are carried along rows of documents.

Two engines, each chunked for training and prefill, naive beside it, and one token at a time for
decoding: `retention` (a matrix memory with a fixed rate per head) and `state_space` (complex modes
per channel). `bookkeeping` says for both where documents begin and how far apart tokens are.
"""
