"""Training: the step, the loop and its parts."""
