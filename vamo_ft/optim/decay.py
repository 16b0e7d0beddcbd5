"""Which parameters weight decay applies to."""

from torch import Tensor

__all__ = ["decays"]


def decays(parameter: Tensor) -> bool:
    """Matrices decay; biases and the gains of norms, which are vectors, do not."""
    return parameter.ndim >= 2
