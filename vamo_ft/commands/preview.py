"""`vamo-ft preview`: what a run would learn from, before it starts."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from vamo_ft.assemble.preview import DataSummary, Piece, Preview, ShownSample, build_preview
from vamo_ft.commands.console import logging_to
from vamo_ft.config.schema import RunConfig

__all__ = ["preview"]

_LEARNT = "bold green"
_BINS = 10
_BAR = 40  # characters of the longest bar


def preview(config: RunConfig, *, samples: int, use_cache: bool = True) -> None:
    """Prints the samples that training takes first, and what lengths training and evaluation data have.

    What is learnt is coloured on a terminal, and stands between `[[` and `]]` elsewhere. A sample's text is one line;
    characters that a terminal would obey are shown as escapes.

    Args:
        samples: how many are shown.
        use_cache: keep tokens, and take them from where they were kept.

    Raises:
        DataError: tokenizer or data are not what the configuration says.
    """
    with logging_to(Console(stderr=True)):
        found = build_preview(config, num_samples=samples, use_cache=use_cache)
    console = Console()
    for line in _lines(found, coloured=console.is_terminal and not console.no_color):
        console.print(line, highlight=False, soft_wrap=True)


def _lines(found: Preview, *, coloured: bool) -> Iterator[Text]:
    for sample in found.samples:
        yield from _sample(sample, coloured=coloured)
        yield Text()
    for line in _summary("training data", found.training):
        yield Text(line)
    if found.mixture is not None:
        yield Text(f"  {found.mixture}")
    yield Text(f"  padding: {found.training.padding:.1%} of micro-batches of {found.rows_at_once}")
    count, size = found.samples_per_epoch, found.batch_size
    yield Text(
        f"  steps: {count / size:,.1f} of {size} samples to an epoch; the run's {found.num_steps:,} are "
        f"{found.num_steps * size / count:,.2f} epochs"
    )
    if found.evaluation is not None:
        for line in _summary("evaluation data", found.evaluation):
            yield Text(line)
        yield Text(f"  padding: {found.evaluation.padding:.1%} of batches sorted by length")


def _sample(sample: ShownSample, *, coloured: bool) -> Iterator[Text]:
    label = "" if sample.label is None else f", class {sample.label}"
    several = f", {len(sample.documents)} documents" if len(sample.documents) > 1 else ""
    learnt = _learnt(sample.num_supervised)
    yield Text(f"sample {sample.index}: {sample.num_tokens} tokens{learnt}{label}{several}")
    for place, document in zip(sample.places, sample.documents, strict=True):
        yield Text(f"  from    {_visible(place)}")
        yield Text("  text    ").append_text(_marked(document.runs, between="", coloured=coloured))
        yield Text("  tokens  ").append_text(_marked(document.tokens, between="|", coloured=coloured))


def _learnt(count: int) -> str:
    """Nothing where no token is, as with a classifier head, which learns the class."""
    return f", {count:,} of them learnt" if count else ""


def _marked(pieces: Sequence[Piece], *, between: str, coloured: bool) -> Text:
    text = Text()
    for number, (supervised, group) in enumerate(groupby(pieces, key=lambda piece: piece.supervised)):
        if number:
            text.append(between)
        words = between.join(_visible(piece.text) for piece in group)
        if supervised and not coloured:
            text.append(f"[[{words}]]")
        else:
            text.append(words, style=_LEARNT if supervised else None)
    return text


def _visible(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _summary(title: str, data: DataSummary) -> Iterator[str]:
    lengths = sorted(data.lengths)
    total = sum(lengths)
    packed = f" of {data.num_documents:,} documents" if data.num_documents > len(lengths) else ""
    yield f"{title}: {len(lengths):,} samples{packed}, {total:,} tokens{_learnt(data.num_supervised)}"
    yield f"  samples cut to data.max_length: {data.num_truncated:,}; rows left out: {data.num_skipped:,}"
    middle, high = lengths[len(lengths) // 2], lengths[min(len(lengths) - 1, len(lengths) * 95 // 100)]
    yield f"  tokens of a sample: {lengths[0]:,} to {lengths[-1]:,}, median {middle:,}, 95 % within {high:,}"
    yield from _histogram(lengths)


def _histogram(lengths: Sequence[int]) -> Iterator[str]:
    """How many of the sorted lengths fall into each of equally wide bins."""
    width = max(1, -(-(lengths[-1] - lengths[0] + 1) // _BINS))
    counts = [0] * ((lengths[-1] - lengths[0]) // width + 1)
    for length in lengths:
        counts[(length - lengths[0]) // width] += 1
    digits = len(f"{lengths[-1]:,}")
    for number, count in enumerate(counts):
        first = lengths[0] + number * width
        bar = "#" * -(-count * _BAR // max(counts))
        yield f"  {first:>{digits},} to {min(first + width - 1, lengths[-1]):>{digits},}  {count:>8,}  {bar}".rstrip()
