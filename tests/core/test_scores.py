import random
import time
from itertools import combinations

import pytest

from vamo_ft.core.scores import best_score, exact_match, rouge_l, token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "match", "f1"),
    [
        ("Paris", "Paris", 1, 1),
        (" the Eiffel\n Tower.", "eiffel tower", 1, 1),
        ("A U.S. state", "us state", 1, 1),  # punctuation goes without leaving a space
        ("well-known", "well known", 0, 0),
        ("theatre", "atre", 0, 0),  # an article is a word, not a beginning
        ("in the old town", "old town", 0, 0.8),  # 2 * 2 / (3 + 2)
        ("tower eiffel", "eiffel tower", 0, 1),  # F1 knows no order
        ("yes yes yes", "yes", 0, 0.5),  # 2 * 1 / (3 + 1): counted as often as both have it
        ("yes yes no", "yes yes", 0, 0.8),
        ("no", "yes", 0, 0),
        ("", "yes", 0, 0),
        ("The!", "", 1, 1),
    ],
)
def test_scores_by_hand(answer: str, reference: str, match: float, f1: float) -> None:
    for pair in ((answer, reference), (reference, answer)):
        assert exact_match(*pair) == match
        assert token_f1(*pair) == pytest.approx(f1, abs=1e-15)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat sat.", "the cat sat", 1),  # articles count here
        ("the cat", "cat the", 0.5),  # order counts: 2 * 1 / (2 + 2)
        ("well-known U.S. town", "a well known town", 2 * 3 / (5 + 4)),  # punctuation separates
        ("a b c d", "b d", 2 * 2 / (4 + 2)),  # gaps do not matter
        ("x x x", "x", 2 * 1 / (3 + 1)),
        ("don't", "don t", 1),
        ("2,000", "2 000", 1),
        ("no", "yes", 0),
        ("", "yes", 0),
        ("", "", 0),
        ("...", "?", 0),
        ("\u4f60\u597d", "\u4f60\u597d", 0),  # no letters that it knows
    ],
)
def test_rouge_l_by_hand(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-15)
    assert rouge_l(reference, answer) == rouge_l(answer, reference)


def test_rouge_l_equals_a_search_through_all_subsequences() -> None:
    draw = random.Random(0)
    for _ in range(60):
        first = [draw.choice("abcd") for _ in range(draw.randrange(1, 9))]
        second = [draw.choice("abcd") for _ in range(draw.randrange(1, 9))]
        of_second = {part for size in range(len(second) + 1) for part in combinations(second, size)}
        longest = max(size for size in range(len(first) + 1) for part in combinations(first, size) if part in of_second)
        assert rouge_l(" ".join(first), " ".join(second)) == pytest.approx(2 * longest / (len(first) + len(second)))


def test_rouge_l_of_long_answers_takes_no_time() -> None:
    draw = random.Random(1)
    texts = [" ".join(str(draw.randrange(300)) for _ in range(4000)) for _ in range(2)]
    began = time.process_time()
    assert 0.1 < rouge_l(*texts) < 0.9
    assert time.process_time() - began < 2


def test_the_best_reference_counts() -> None:
    references = ["the old town", "an old town hall", "town"]
    assert best_score(token_f1, "town hall", references) == pytest.approx(0.8)  # 2 * 2 / (2 + 3)
    assert best_score(exact_match, "Town!", references) == 1
    assert best_score(rouge_l, "old hall", references) == pytest.approx(2 * 2 / (2 + 4))
