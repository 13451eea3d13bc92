"""Training: the objective, the optimizers and the loops."""
