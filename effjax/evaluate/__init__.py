"""What a method is worth: bits per byte, the record of a row, Pareto fronts, and the report."""
