"""Benchmarks: ratios of CPU seconds on one pinned core, from interleaved rounds."""
