"""The paper's experiments: `scripts/paper`."""
