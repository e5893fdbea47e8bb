"""Training: the loop, the step, evaluation, checkpoints, metrics."""
