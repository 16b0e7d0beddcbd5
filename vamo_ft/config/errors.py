"""What is wrong with a configuration."""

from collections.abc import Sequence


class ConfigError(Exception):
    """One or more problems of a configuration, each a line such as `config.yaml:14: method.probs: unknown key.`"""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        assert problems
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)
