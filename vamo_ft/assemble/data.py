"""What the data of a run needs from its surroundings, and what is told of it."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from vamo_ft.config.objective import MetricObjectiveConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.data.cache import TokenCache, cache_folder
from vamo_ft.data.loading import load_samples
from vamo_ft.data.mixture import Mixture
from vamo_ft.data.samples import EvaluationSamples, TrainingSamples
from vamo_ft.models.fingerprint import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["build_cache", "build_samples", "mixture_in_words", "tell_mixture"]

_log = logging.getLogger("vamo_ft")


def build_cache(tokenizer: "PreTrainedTokenizerBase") -> TokenCache:
    """Of what a tokenizer makes of data sets."""
    return TokenCache(cache_folder(), tokenizer_fingerprint(tokenizer))


def build_samples(
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    position_ids: bool,
    use_cache: bool,
    stop_requested: Callable[[], bool],
) -> tuple[TrainingSamples, EvaluationSamples | None]:
    """The data of a run, all of what is held out included, as `load_samples` reads it; `use_cache` keeps its tokens."""
    return load_samples(
        config.data,
        tokenizer,
        task=config.model.task,
        batch_size=config.training.batch_size,
        seed=config.run.seed,
        metric=config.objective if isinstance(config.objective, MetricObjectiveConfig) else None,
        answer_tokens=config.evaluation.answer_tokens,
        position_ids=position_ids,
        offline=config.run.offline,
        cache=build_cache(tokenizer) if use_cache else None,
        stop_requested=stop_requested,
    )


def tell_mixture(mixture: Mixture) -> None:
    """Logs how several data sets make up an epoch."""
    if (words := mixture_in_words(mixture)) is not None:
        _log.info("data.train: %s", words)


def mixture_in_words(mixture: Mixture) -> str | None:
    """How several data sets make up an epoch; None: there is one."""
    if len(mixture.sizes) == 1:
        return None
    sizes, draws = (", ".join(map(str, numbers)) for numbers in (mixture.sizes, mixture.draws))
    return f"{len(mixture.sizes)} data sets of {sizes} samples; an epoch draws {draws} of them"
