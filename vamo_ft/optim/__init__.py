"""Layer 2: update rules and learning-rate schedules."""
