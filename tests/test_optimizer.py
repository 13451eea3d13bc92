"""Muon: orthogonal updates, convergence, and every parameter with exactly one optimizer."""

import copy

import pytest
import torch
from torch import Tensor, nn

from varedit.testing import tiny_image_tokenizer, tiny_transformer
from varedit.training.optimizer import Muon, muon_and_adamw, orthogonalize


def random_matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (48, 24 * 3 * 3)], ids=["tall", "wide", "convolution"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_singular_values_become_about_one(shape, scale):
    matrix = random_matrix(*shape) * scale
    result = orthogonalize(matrix)
    assert result.shape == matrix.shape and result.dtype == matrix.dtype
    u, values, vh = torch.linalg.svd(result, full_matrices=False)
    assert values.min() > 0.6 and values.max() < 1.3
    # Along the nearest semi-orthogonal matrix, not just along any.
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.cosine_similarity((u @ vh).flatten(), result.flatten(), dim=0) > 0.98


def test_a_zero_matrix_stays_zero():
    assert orthogonalize(torch.zeros(20, 30)).eq(0).all()


def test_a_step_has_unit_rms_singular_values_times_the_learning_rate():
    parameter = nn.Parameter(random_matrix(24, 6, 2, 2))
    before = parameter.detach().clone()
    optimizer = Muon([parameter], lr=0.1, weight_decay=0.0)
    parameter.grad = random_matrix(24, 6, 2, 2)
    optimizer.step()
    values = torch.linalg.svdvals((parameter.detach() - before).flatten(1))
    assert values.min() > 0.06 and values.max() < 0.13


def test_matrices_of_one_shape_are_updated_as_each_alone(monkeypatch):
    shapes = [(24, 40), (24, 40), (40, 24), (24, 5, 8), (24, 40)]
    generator = torch.Generator().manual_seed(0)
    start, gradients = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))

    def stepped(together: int) -> list[torch.Tensor]:
        monkeypatch.setattr("varedit.training.optimizer._TOGETHER", together)
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.clone()
        Muon(parameters, lr=0.1).step()
        return [parameter.detach() for parameter in parameters]

    alone = stepped(1)
    for together in (2 * 24 * 40, 1 << 22):
        for one, other in zip(stepped(together), alone):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    assert all(not torch.equal(one, value) for one, value in zip(alone, start))


def test_weight_decay_shrinks_towards_zero():
    parameter = nn.Parameter(torch.ones(20, 20))
    parameter.grad = torch.zeros(20, 20)
    Muon([parameter], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(parameter.detach(), torch.full((20, 20), 0.95))


def test_a_parameter_without_gradient_is_left_alone():
    parameter = nn.Parameter(random_matrix(20, 20))
    before = parameter.detach().clone()
    Muon([parameter], lr=0.1).step()
    assert torch.equal(parameter, before)


def small_regression() -> tuple[nn.Module, Tensor, Tensor]:
    """A network of convolutions and matrices, and pictures with numbers to predict."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3),
        nn.GELU(),
        nn.Conv2d(24, 24, 3),
        nn.Flatten(),
        nn.Linear(96, 32),
        nn.GELU(),
        nn.Linear(32, 2),
    )
    inputs = torch.randn(64, 3, 6, 6)
    return model, inputs, torch.stack([inputs.mean((1, 2, 3)) * 5, inputs[:, 0].amax((1, 2))], dim=1)


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], inputs: Tensor, wanted: Tensor, steps: int):
    for _ in range(steps):
        loss = (model(inputs) - wanted).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return loss.item()


def test_a_small_regression_converges():
    model, inputs, wanted = small_regression()
    optimizers = muon_and_adamw(model, muon_lr=0.02, adamw_lr=3e-3)
    first = train(model, optimizers, inputs, wanted, 1)
    assert train(model, optimizers, inputs, wanted, 150) < 0.02 * first


def test_resuming_from_saved_state_equals_no_interruption():
    model, inputs, wanted = small_regression()
    optimizers = muon_and_adamw(model, muon_lr=0.02, adamw_lr=3e-3)
    train(model, optimizers, inputs, wanted, 3)
    resumed = copy.deepcopy(model)
    resumed_optimizers = muon_and_adamw(resumed, muon_lr=1.0, adamw_lr=1.0)
    for optimizer, saved in zip(resumed_optimizers, optimizers):
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    for network, own in ((model, optimizers), (resumed, resumed_optimizers)):
        train(network, own, inputs, wanted, 3)
    for parameter, expected in zip(resumed.parameters(), model.parameters()):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize(
    "build, prefix", [(tiny_transformer, "blocks."), (tiny_transformer, ""), (tiny_image_tokenizer, "")]
)
def test_every_parameter_has_exactly_one_optimizer(build, prefix):
    model = build()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = muon_and_adamw(model, muon_lr=0.02, adamw_lr=1e-3, prefix=prefix)
    matrices, others = ([names[id(p)] for g in opt.param_groups for p in g["params"]] for opt in (muon, adamw))
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    assert sorted(matrices + others) == sorted(names.values())
    shapes = dict(model.named_parameters())
    for name in matrices:
        assert name.startswith(prefix) and shapes[name].ndim >= 2 and min(shapes[name].shape[:2]) > 16
    for name in others:
        assert not name.startswith(prefix) or shapes[name].ndim < 2 or min(shapes[name].shape[:2]) <= 16


def test_frozen_parameters_have_no_optimizer():
    model = tiny_transformer()
    model.requires_grad_(False)
    model.blocks[0].requires_grad_(True)
    optimizers = muon_and_adamw(model, muon_lr=0.02, adamw_lr=1e-3)
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(parameter) for parameter in model.blocks[0].parameters())


def test_parts_named_learn_at_their_own_rate():
    model = tiny_transformer(num_blocks=3)
    plain = muon_and_adamw(model, 0.1, 0.01, prefix="blocks.")
    factors = {"blocks.1.": 4.0}
    for optimizer, before, rate in zip(
        muon_and_adamw(model, 0.1, 0.01, prefix="blocks.", factors=factors), plain, (0.1, 0.01)
    ):
        rates = {id(p): group["lr"] / rate for group in optimizer.param_groups for p in group["params"]}
        inside = {id(p) for p in model.blocks[1].parameters()}
        assert rates.keys() == {id(p) for group in before.param_groups for p in group["params"]}
        assert all(factor == pytest.approx(4.0 if one in inside else 1.0) for one, factor in rates.items())
        assert inside & rates.keys() and rates.keys() - inside
