"""Estimators that keep nothing between steps."""

from vamo_ft.core.protocols import SampleSource, StateDict
from vamo_ft.core.types import Work

__all__ = ["Stateless"]


class Stateless:
    """What such an estimator has in common with the others."""

    def prepare(self, source: SampleSource, step: int) -> Work:
        """Nothing is due."""
        return Work()

    def state_dict(self) -> StateDict:
        """Nothing is kept between steps."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Nothing is kept between steps."""
