"""What to run: budgets that make rows comparable, and the choice among them."""
