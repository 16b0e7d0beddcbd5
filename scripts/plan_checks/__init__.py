"""Plans of memory against measured runs."""
