"""Layer 1: the run's configuration. Imports pydantic and yaml, never torch."""
