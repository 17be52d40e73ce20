"""How a token's position enters the computation."""
