"""A few rows of a data set, drawn at random."""

from pydantic import Field, model_validator

from vamo_ft.config.section import Section

__all__ = ["SampleConfig"]


class SampleConfig(Section):
    """Rows drawn without replacement; which ones depends on the seed and the number of rows alone.

    Two samples of one data set with one seed have no row in common where the second one skips what the first one takes.
    """

    size: int | None = Field(None, gt=0, description="number of rows; write this or per_class")
    per_class: int | None = Field(None, gt=0, description="rows of each class (k of k-shot); write this or size")
    seed: int = Field(0, ge=0, lt=2**63, description="which rows are drawn")
    skip: int = Field(0, ge=0, description="rows, of each class with per_class, to leave out first, for other samples")

    @model_validator(mode="after")
    def _one_size(self) -> "SampleConfig":
        if (self.size is None) == (self.per_class is None):
            raise ValueError("write exactly one of size and per_class")
        return self
