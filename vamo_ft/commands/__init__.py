"""Layer 4: one verb of the command line per file."""
