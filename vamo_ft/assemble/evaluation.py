"""The evaluation of a model that was trained."""

from collections.abc import Callable, Sequence
from pathlib import Path

from vamo_ft.assemble.data import build_cache
from vamo_ft.assemble.model import build_run_runtime, load_run_model
from vamo_ft.assemble.objective import build_objective
from vamo_ft.assemble.parts import check_positions, check_vocabulary
from vamo_ft.assemble.predictions import Predictions
from vamo_ft.config.data import DataSetConfig
from vamo_ft.config.schema import RunConfig
from vamo_ft.core.protocols import Progress
from vamo_ft.data.loading import load_evaluation
from vamo_ft.models.generation import text_decoder
from vamo_ft.training.evaluation import EvaluationResult, Observer, evaluate

__all__ = ["evaluate_model"]


def evaluate_model(
    config: RunConfig,
    data_set: DataSetConfig,
    *,
    weights: Path,
    progress: Progress,
    use_cache: bool = True,
    stop_requested: Callable[[], bool] = lambda: False,
    observers: Sequence[Observer] = (),
    predictions: Path | None = None,
) -> EvaluationResult:
    """Loss and scores on `data_set` of the model saved in `weights`; of the configured half, where it is the run's own.

    Args:
        use_cache: keep tokens, and take them from where they were kept.
        observers: are shown every batch with its samples' losses and scores.
        predictions: a file for what the model answers to each sample; see `Predictions`.

    Raises:
        StopRequested: between two batches.
        DataError: model or data are not what the configuration says.
        UsageError: the model has no positions for the longest sample, or the predictions cannot be written.
    """
    runtime = build_run_runtime(config)
    loaded = load_run_model(config, runtime=runtime, weights=weights)
    held_out = load_evaluation(
        config.data,
        data_set,
        loaded.tokenizer,
        task=config.model.task,
        answer_tokens=config.evaluation.answer_tokens,
        position_ids=loaded.accepts_position_ids,
        offline=config.run.offline,
        cache=build_cache(loaded.tokenizer) if use_cache else None,
    )
    if data_set == config.data.evaluation and config.evaluation.part is not None:
        held_out = held_out.half(config.evaluation.part)
    check_positions(loaded, held_out)
    check_vocabulary(config, loaded, held_out)
    found = Predictions(
        config,
        data_set,
        held_out,
        decode=text_decoder(loaded.tokenizer),
        decode_all=text_decoder(loaded.tokenizer, special_tokens=True),
    )
    result = evaluate(
        build_objective(config, loaded),
        held_out,
        runtime,
        token_budget=config.training.forward_batch_tokens,
        progress=progress,
        stop_requested=stop_requested,
        observers=observers if predictions is None else [*observers, found.observe],
    )
    if predictions is not None:
        found.write(predictions)
    return result
