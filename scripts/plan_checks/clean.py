"""The environment in which resident memory is what is held."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["clean_environment"]


@contextmanager
def clean_environment() -> Iterator[dict[str, str]]:
    """Of a process of one thread that gives freed memory back at once, and compiles anew, as on a user's first run."""
    with tempfile.TemporaryDirectory() as cache:
        yield {
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "0",
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": cache,
        }
