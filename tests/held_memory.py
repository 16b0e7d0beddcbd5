"""What each process of a group holds at most while it trains, on real tensors, as a module that it is started with.

    python -m tests.held_memory FILE...      with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, in a workspace

writes the bytes for every configuration FILE to FILE.<rank>.json.
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from vamo_ft.assemble.method import build_update_rule
from vamo_ft.assemble.parts import build_parts
from vamo_ft.assemble.passes import Reach
from vamo_ft.config.load import load_config
from vamo_ft.core.allocations import AllocationTrace
from vamo_ft.core.hashing import Domain, HashKey
from vamo_ft.estimators.first_order import FirstOrder
from vamo_ft.estimators.probes import LossProbe, probe_points
from vamo_ft.models.export import gathered
from vamo_ft.training import runtime as runtime_module
from vamo_ft.training.runtime import connected


def measured(file: str) -> dict[str, int]:
    config = load_config(Path(file)).config
    parts = build_parts(config, weights=None, use_cache=False)
    model, parameters, runtime = parts.loaded.model, parts.parameters, parts.runtime
    tensors, buckets = [*model.parameters(), *model.buffers()], dict[int, Tensor]()
    exchange = runtime_module._summed

    def noted(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buckets[bucket.index()] = bucket.buffer()
        return exchange(state, bucket)

    runtime_module._summed = noted
    batch = parts.source.batch(range(3))

    def peak(work: Callable[[], object]) -> int:
        for _ in range(2):  # in the first FSDP2 makes what it keeps, and before the second DDP makes it anew
            work()
            parameters.clear_gradients()
        gc.collect()
        with AllocationTrace([*tensors, *buckets.values()]) as trace:
            before = trace.now
            work()
        parameters.clear_gradients()
        return trace.peak - before

    found = {"weights": AllocationTrace(tensors).now, "elements": parameters.num_held}
    estimator = FirstOrder(parts.objective, parameters, runtime, seed=0)
    for name, passes in (("one pass", 1), ("two passes", 2)):  # of each process
        batches = [batch] * (passes * 2)
        found[name] = peak(lambda batches=batches: estimator.estimate(batches, 0))  # type: ignore[misc]
    found["exchanged"] = sum(bucket.nbytes for bucket in buckets.values())
    runtime_module._summed = exchange
    reach = Reach(parameters.numel, rowwise=True, support=tuple(range(len(parameters.tensors))))
    probe = LossProbe(parts.objective, parameters, reach, runtime)
    points, keys = probe_points("central", num_probes=1, eps=1e-3), (HashKey(0, Domain.DIRECTION, 0, 0),)
    found["probes"] = peak(lambda: list(probe.evaluate([batch], points, keys)))
    if parameters.sharded:
        found["checkpoint"] = peak(lambda: gathered(model, keep=runtime.is_main))
    rule = build_update_rule(config, parameters, None)
    rule.apply(estimator.estimate([batch, batch], 0), learning_rate=0.0, step=0)
    states = (value for state in rule._optimizer.state.values() for value in state.values())  # type: ignore[attr-defined]
    found["optimizer"] = sum(value.nbytes for value in states if value.ndim > 0)
    return found


def main() -> None:
    torch.set_num_threads(1)
    with connected() as processes:
        assert processes is not None
        for file in sys.argv[1:]:
            Path(f"{file}.{processes.rank}.json").write_text(json.dumps(measured(file)))


if __name__ == "__main__":
    main()
