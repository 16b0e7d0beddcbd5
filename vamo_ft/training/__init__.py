"""Layer 2: the loop, and what happens around a step."""
