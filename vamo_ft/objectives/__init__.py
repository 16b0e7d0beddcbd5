"""Layer 2: per-sample losses. Each objective owns its module and reduces nothing."""
