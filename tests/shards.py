"""Runs of one configuration file after the other by the processes of one group, as a module that each is started with.

    python -m tests.shards FILE PORT FILE PORT ...      with RANK, WORLD_SIZE and MASTER_ADDR, in a workspace

trains every FILE; the processes meet at PORT.
"""

import os
import sys

import torch
from accelerate.state import AcceleratorState

from vamo_ft.cli import run
from vamo_ft.models import loading


def main() -> None:
    if os.environ["RANK"] != "0":
        loading._load = None  # reads weights, which is the main process's part  # type: ignore[assignment]
    train_all()


def train_all() -> None:
    torch.set_num_threads(1)
    files, ports = sys.argv[1::2], sys.argv[2::2]
    for file, port in zip(files, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        if code := run(["train", file]):
            sys.exit(code)
        AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    main()
