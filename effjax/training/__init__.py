"""Training: the step, the loop, precision, schedules, and checkpoints."""
