"""Runs of runs: what many trainings, or measurements on a model, tell together."""
