import pytest

from vamo_ft.core.scores import exact_match, token_f1


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
