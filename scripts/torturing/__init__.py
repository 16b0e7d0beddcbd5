"""Attacks on real training runs: each must end with the weights and metrics of a run that was left alone."""
