"""One question per file: each imports, runs and shows, and defines nothing that others need."""
