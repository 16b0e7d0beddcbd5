import pytest
import torch
from transformers import get_scheduler

from vamo_ft.optim.schedules import learning_rate_at

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
def test_values_are_those_of_transformers(schedule, warmup_steps):
    total_steps = 23
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    reference = get_scheduler(NAMES[schedule], optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
    for step in range(total_steps):
        ours = learning_rate_at(step, schedule=schedule, peak=0.4, warmup_steps=warmup_steps, total_steps=total_steps)
        assert ours == pytest.approx(reference.get_last_lr()[0], abs=1e-15)
        reference.step()
