"""Keeps tokens and passwords out of what a command prints, logs and writes to `status.json`.

The configuration is the user's own text and is saved with the run as it is; no key of it takes a secret.
"""

import logging
import os
import re

__all__ = ["SecretsFilter", "masked"]

_MASK = "***"
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
_SHORTEST = 8  # a shorter value, such as TOKENIZERS_PARALLELISM=false, would be found in any text
_SHAPES = (
    re.compile(r"(?<=://)[^/\s@]+(?=@)"),  # https://user:password@host
    re.compile(r"(?i)(?<=bearer )[\w.~+/-]{8,}"),
    re.compile(r"(?i)(?<=[?&;])([\w-]*(?:token|key|password|secret|signature|sig)=)[^&\s'\"]+"),
    re.compile(r"\b(?:hf_|ghp_|github_pat_|sk-|wandb_v1_)\w[\w-]{15,}"),
)


def masked(text: str) -> str:
    """`text` with `***` for the values of secret environment variables, credentials in URLs, and well-known tokens."""
    secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST}
    for secret in sorted(secrets, key=len, reverse=True):  # one may be part of another
        text = text.replace(secret, _MASK)
    for shape in _SHAPES:
        text = shape.sub(lambda match: (match[1] if match.re.groups else "") + _MASK, text)
    return text


class SecretsFilter(logging.Filter):
    """Masks the message of every record that passes."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replaces the record's message; never drops one."""
        record.msg, record.args = masked(record.getMessage()), ()
        return True
