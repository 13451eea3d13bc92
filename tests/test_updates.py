"""Learning rates and the average of the weights."""

import pytest
import torch

from varedit.training.config import OptimizerConfig
from varedit.training.updates import Average, learning_rate_factor


def test_learning_rates():
    config = OptimizerConfig(warm_up=4, decay="linear", decay_fraction=0.5, final_factor=0.1)
    factors = [learning_rate_factor(step, step / 20, config) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and factors[10] == 1.0
    assert factors[15] == pytest.approx(0.55) and factors[19] == pytest.approx(0.19)
    cosine = OptimizerConfig(decay="cosine", decay_fraction=1.0, final_factor=0.0)
    assert learning_rate_factor(10, 0.5, cosine) == pytest.approx(0.5)
    assert learning_rate_factor(10, 1.0, OptimizerConfig(decay="linear", decay_fraction=0.0)) == 1.0


def test_the_average_is_applied_and_taken_back():
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = Average({"p": parameter}, decay=0.5)
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update(step=0)  # decay 0.1 at first
    with average.applied():
        torch.testing.assert_close(parameter.detach(), torch.full((2,), 0.9))
    assert parameter.eq(1).all()
