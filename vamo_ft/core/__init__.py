"""Layer 0: types, protocols and the numerics of directions. Imports torch and the standard library only."""
