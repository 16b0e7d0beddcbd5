"""How well a generated answer agrees with the reference, from 0 to 1.

Both are normalised first: lower case, without ASCII punctuation and the articles a, an and the, cut into words at white
space.

Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", arXiv 1606.05250,
section 6.1.
"""

import string
from collections import Counter

__all__ = ["exact_match", "token_f1"]

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


def _words(text: str) -> list[str]:
    return [word for word in text.lower().translate(_WITHOUT_PUNCTUATION).split() if word not in _ARTICLES]
