"""Training: the one loop, and what it is given: data, an objective, an optimizer, a schedule, a state that survives."""
