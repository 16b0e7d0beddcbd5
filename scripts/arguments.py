"""Values of options that several of the command lines here take."""

import argparse
from collections.abc import Callable, Collection


def positive(text: str) -> int:
    """A whole number above 0."""
    if (value := int(text)) <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def cases_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Names of cases with commas between them."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no case {unknown[0]}; there are {', '.join(known)}")
        return names

    return parse
