"""How well a generated answer agrees with the reference, from 0 to 1.

For `exact_match` and `token_f1` both are normalised first: lower case, without ASCII punctuation and the articles a, an
and the, cut into words at white space (Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of
Text", arXiv 1606.05250, section 6.1). `rouge_l` has words of its own.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

__all__ = ["best_score", "exact_match", "rouge_l", "token_f1"]

_ARTICLES = {"a", "an", "the"}
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, reference: str) -> float:
    """1 where the normalised words are the same in the same order, else 0.

    >>> exact_match("The Eiffel  Tower.", "eiffel tower")
    1.0
    """
    return float(_words(answer) == _words(reference))


def token_f1(answer: str, reference: str) -> float:
    """`F1 = 2 P R / (P + R) = 2 c / (m + n)`: c words in common, counted as often as both have them, of m and n words.

    Without words on either side the two agree, F1 = 1.

    >>> token_f1("in the old town", "old town")
    0.8
    """
    answer_words, reference_words = _words(answer), _words(reference)
    total = len(answer_words) + len(reference_words)
    common = Counter(answer_words) & Counter(reference_words)
    return 2 * common.total() / total if total else 1.0


def rouge_l(answer: str, reference: str) -> float:
    """`F = 2 P R / (P + R) = 2 l / (m + n)`: l words of the longest common subsequence, of m and n words.

    Words are runs of a to z and 0 to 9 in lower case, as in Google's `rouge-score` without its stemmer; the texts are
    taken as one sentence each. Without words on either side F = 0, so that languages of other letters have no score.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1.

    >>> rouge_l("the old town hall", "the town's old hall")
    0.6666666666666666
    """
    answer_words, reference_words = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, reference))
    total = len(answer_words) + len(reference_words)
    return 2 * _common_subsequence(answer_words, reference_words) / total if total else 0.0


def best_score(score: Callable[[str, str], float], answer: str, references: Sequence[str]) -> float:
    """The score of an answer against the reference that it agrees with most."""
    return max(score(answer, reference) for reference in references)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    A row of the usual table is one integer: bit i is 0 where the length grows with word i of `first`. Each word of
    `second` then takes a few operations on an integer (Hyyro 2004, "Bit-parallel LCS-length computation revisited").
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(first)) - 1
    row = everything
    for word in second:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & everything
    return len(first) - row.bit_count()


def _words(text: str) -> list[str]:
    return [word for word in text.lower().translate(_WITHOUT_PUNCTUATION).split() if word not in _ARTICLES]
