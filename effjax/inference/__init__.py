"""Generation, sampling and what decoding keeps in memory."""
