"""Layer 2: gradient estimators. Each knows the mathematics of one method and nothing of the training loop."""
