"""A synthetic experiment of the paper: one problem, several methods, the same steps and seeds for all."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vamo_ft.config.comparison import Seed, Seeds, check_tuning_seed
from vamo_ft.config.method import OPTIMIZERS, MethodConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.config.section import Section

__all__ = ["ArmConfig", "DigitsConfig", "ExperimentConfig", "LeastSquaresConfig", "ProblemConfig", "arm_run"]


class LeastSquaresConfig(Section):
    """Non-convex least squares `f_i(x) = (y_i - sigmoid(a_i . x))^2` on random data."""

    type: Literal["least_squares"] = Field(description="least_squares, or digits")
    samples: int = Field(1000, gt=0, description="n")
    dimension: int = Field(100, gt=0, description="d, also the number of parameters")
    flipped: float = Field(
        0.1, ge=0, lt=0.5, description="share of labels that are wrong, so that samples disagree at the optimum too"
    )
    seed: Seed = Field(0, description="seed of the data, which are the same for all methods and seeds")


class DigitsConfig(Section):
    """A network with one hidden layer on the 1,797 handwritten digits of scikit-learn, 8 x 8 pixels each."""

    type: Literal["digits"] = Field(description="digits, or least_squares")
    hidden: int = Field(32, gt=0, description="hidden units; 75 h + 10 parameters")


ProblemConfig = Annotated[LeastSquaresConfig | DigitsConfig, Field(discriminator="type")]


class ArmConfig(Section):
    """One method, as it is compared."""

    label: str = Field(min_length=1, description="name in figures and tables")
    method: MethodConfig = Field(description="the method section of a run's file; nothing is preset")
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="step sizes that are tried with the tuning seed; all methods try the same number"
    )

    @model_validator(mode="after")
    def _goes_through_plain_sgd(self) -> "ArmConfig":
        if (rule := OPTIMIZERS.get(self.method.name, "sgd")) != "sgd":
            raise ValueError(f"method.name: {self.method.name} goes through {rule}, and every method here through sgd")
        return self


class ExperimentConfig(Section):
    """The whole file of an experiment. Every method goes through plain SGD without clipping."""

    title: str = Field(min_length=1, description="heading of the figure")
    problem: ProblemConfig
    batch_size: int = Field(gt=0, description="samples per step")
    steps: int = Field(gt=0, description="updates of each run")
    record_every: int = Field(gt=0, description="steps between two evaluations of the training loss on all samples")
    seeds: Seeds = Field(min_length=1, description="seeds of starting point, sample order and directions")
    tuning_seed: Seed = Field(description="seed with which step sizes are chosen; none of seeds")
    arms: list[ArmConfig] = Field(min_length=1, description="the methods")

    @model_validator(mode="after")
    def _tuning_is_apart(self) -> "ExperimentConfig":
        check_tuning_seed(self.tuning_seed, self.seeds)
        return self

    @model_validator(mode="after")
    def _arms_are_told_apart_and_tried_alike(self) -> "ExperimentConfig":
        labels = [arm.label for arm in self.arms]
        if repeated := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"arms: two have the label {repeated[0]!r}")
        if len({len(arm.learning_rates) for arm in self.arms}) > 1:
            raise ValueError("arms: all must try the same number of learning_rates")
        return self


def arm_run(experiment: ExperimentConfig, arm: ArmConfig, *, seed: int, learning_rate: float) -> RunConfig:
    """The arm as a run's configuration, with the problem in the place of model and data.

    So an experiment's methods are built, and checked, by what builds and checks those of a run.

    Raises:
        ValidationError: the method cannot be used like this.
    """
    name = experiment.problem.type
    return RunConfig.model_validate(
        {
            "run": {"name": name, "seed": seed, "offline": True},
            "model": {"path": name},
            "data": {"train": {"path": name}, "format": {"type": "prompt_completion"}},
            "method": arm.method,
            "optimizer": {"name": "sgd", "learning_rate": learning_rate},
            "training": {"steps": experiment.steps, "batch_size": experiment.batch_size},
        }
    )
