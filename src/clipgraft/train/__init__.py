"""Training: one objective, one loop, exact resume."""
