"""From logits to bits: random numbers, guidance, temperature and top-p."""

import math

import numpy as np
import pytest
import torch

from varedit.sampling import guide, random_uniform, sample_bits

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def seeds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# -- random numbers -------------------------------------------------------------------------------------------------


def mix(x: int) -> int:
    """SplitMix64's finalizer in Python's own integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_finalizer_of_the_reference_is_splitmix64():
    # the generator's published first outputs from state 0
    assert [mix(GOLDEN * k & MASK) for k in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("seed", [0, 1, -1, 42, 2**63 - 1, -(2**63)])
def test_equals_the_same_formula_in_python_integers(seed):
    for scale in (0, 5, 12):
        stream = mix((mix((seed * GOLDEN) & MASK) + (scale + 1) * GOLDEN) & MASK)
        top = [mix((stream + n * GOLDEN) & MASK) >> 41 for n in range(1, 13)]
        expected = torch.tensor([(t + 0.5) / 2**23 for t in top], dtype=torch.float64)
        numbers = random_uniform(seeds(seed), scale, 3, 4)
        assert numbers.dtype == torch.float32 and numbers.shape == (1, 3, 4)
        assert torch.equal(numbers.double().flatten(), expected)  # 24 bits: exact in float32


def test_do_not_depend_on_the_batch():
    values = [3, -7, 2**62 + 5, 3, 0, 11]
    together = random_uniform(seeds(*values), 4, 20, 7)
    for row, value in enumerate(values):
        assert torch.equal(together[row], random_uniform(seeds(value), 4, 20, 7)[0])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    assert torch.equal(random_uniform(seeds(*values)[order], 4, 20, 7), together[order])


def test_do_not_depend_on_the_number_of_tokens_or_on_torchs_own_state():
    torch.manual_seed(1)
    many = random_uniform(seeds(5), 2, 100, 8)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(random_uniform(seeds(5), 2, 10, 8), many[:, :10])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_scale_position_and_bit_each_matter():
    base = random_uniform(seeds(0, 1), 0, 64, 16)
    assert not torch.equal(base[0], base[1])
    assert not torch.equal(base, random_uniform(seeds(0, 1), 1, 64, 16))
    assert base[0].unique().numel() > 1000  # of 1024


def test_lie_strictly_between_0_and_1():
    numbers = random_uniform(seeds(*range(64), -1, 2**63 - 1, -(2**63)), 3, 256, 32)
    assert numbers.min() > 0 and numbers.max() < 1
    assert numbers.min() < 1e-4 and numbers.max() > 1 - 1e-4
    # and so do the two ends of the 23-bit range
    assert 0.0 < (torch.tensor(0.0) + 0.5) / 2**23 and (torch.tensor(2.0**23 - 1) + 0.5) / 2**23 < 1.0


@pytest.mark.parametrize("seed", [0, 1, -1, 123456789, 2**63 - 1, -(2**63)])
def test_are_uniform(seed):
    numbers = random_uniform(seeds(seed), 6, 256, 32).flatten().double().sort().values
    count = len(numbers)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((steps[1:] - numbers).max(), (numbers - steps[:-1]).max())
    assert distance * math.sqrt(count) < 1.95  # Kolmogorov-Smirnov: exceeded once in a thousand samples
    assert abs(numbers.mean().item() - 0.5) < 0.01
    assert abs(numbers.var().item() - 1 / 12) < 0.003


def test_neighbours_are_uncorrelated():
    numbers = torch.stack([random_uniform(torch.arange(-4, 4), scale, 128, 16) for scale in range(4)])  # scale, seed
    pairs = {
        "bits": (numbers[..., :-1], numbers[..., 1:]),
        "positions": (numbers[:, :, :-1], numbers[:, :, 1:]),
        "seeds": (numbers[:, :-1], numbers[:, 1:]),
        "scales": (numbers[:-1], numbers[1:]),
        "a seed's next scale and the next seed's scale": (numbers[1:, :-1], numbers[:-1, 1:]),
    }
    for name, (left, right) in pairs.items():
        correlation = np.corrcoef(left.flatten().numpy(), right.flatten().numpy())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(left.numel()), name


# -- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_identities():
    torch.manual_seed(0)
    conditional, unconditional = torch.randn(2, 5, 3, 2), torch.randn(2, 5, 3, 2)
    assert torch.equal(guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guide(conditional, conditional, 4.0), conditional)
    torch.testing.assert_close(
        guide(conditional, unconditional, 4.0), unconditional + 4.0 * (conditional - unconditional)
    )


def test_temperature_before_or_after_guidance_is_the_same():
    torch.manual_seed(0)
    conditional, unconditional = torch.randn(4, 2), torch.randn(4, 2)
    torch.testing.assert_close(
        guide(conditional / 0.5, unconditional / 0.5, 3.0), guide(conditional, unconditional, 3.0) / 0.5
    )


# -- choosing -------------------------------------------------------------------------------------------------------


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Probability of bit 1 by the generic recipe: sort, keep values until their sum reaches top_p, renormalise."""
    probabilities = (logits.double() / temperature).softmax(-1)
    descending, order = probabilities.sort(dim=-1, descending=True)
    before = descending.cumsum(-1) - descending
    descending = torch.where(before < top_p, descending, 0.0)
    kept = torch.zeros_like(probabilities).scatter(-1, order, descending)
    return (kept / kept.sum(-1, keepdim=True))[..., 1]


@pytest.mark.parametrize("top_p", [1.0, 0.97, 0.8, 0.5, 0.3, 0.01])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_top_p_in_closed_form_equals_the_generic_nucleus(temperature, top_p):
    torch.manual_seed(0)
    logits = torch.randn(4000, 2) * 3
    probability = nucleus(logits, temperature, top_p)
    if top_p <= 0.5:  # the likelier value alone
        assert set(probability.tolist()) == {0.0, 1.0}
    random = random_uniform(seeds(9), 0, 4000, 1)[0, :, 0]
    chosen = sample_bits(logits, random, temperature, top_p)
    assert chosen.dtype == torch.bool
    # a number closer to the probability than float32 resolves could go either way
    clear = (random - probability).abs() > 1e-6
    assert clear.float().mean() > 0.999
    assert torch.equal(chosen[clear], (random < probability)[clear])


@pytest.mark.parametrize("random", [1e-7, 0.5, 1 - 1e-7])
def test_top_p_drops_the_unlikely_value_for_every_random_number(random):
    number = torch.tensor([random])
    assert sample_bits(torch.tensor([[0.0, 4.0]]), number, 1.0, 0.97).item() is True  # probability 0.982
    assert sample_bits(torch.tensor([[4.0, 0.0]]), number, 1.0, 0.97).item() is False
    kept = sample_bits(torch.tensor([[0.0, 3.0]]), number, 1.0, 0.97).item()  # probability 0.953: both stay
    assert kept is (random < 0.953)


def test_temperature_0_takes_the_larger_logit_and_a_tie_is_bit_0():
    logits = torch.tensor([[0.0, 1e-6], [1e-6, 0.0], [2.0, 2.0], [-1.0, -1.0], [-5.0, 5.0], [5.0, -5.0]])
    expected = torch.tensor([True, False, False, False, True, False])
    for random in (1e-7, 0.5, 1 - 1e-7):
        for top_p in (1.0, 0.5):
            assert torch.equal(sample_bits(logits, torch.full((6,), random), 0.0, top_p), expected)


def test_low_temperature_tends_to_the_larger_logit():
    torch.manual_seed(0)
    logits, random = torch.randn(1000, 2), random_uniform(seeds(1), 0, 1000, 1)[0, :, 0]
    assert torch.equal(sample_bits(logits, random, 1e-6), sample_bits(logits, random, 0.0))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.9)])
def test_frequencies_match_the_probabilities(temperature, top_p):
    margins = torch.linspace(-4, 4, 9)
    logits = torch.stack([torch.zeros(9), margins], dim=-1)
    count = 20_000
    random = random_uniform(seeds(2024), 0, count, 9)[0]
    frequency = sample_bits(logits.expand(count, 9, 2), random, temperature, top_p).double().mean(0)
    probability = nucleus(logits, temperature, top_p)
    tolerance = 4 * (probability * (1 - probability) / count).sqrt() + 1e-9
    assert ((frequency - probability).abs() <= tolerance).all()


def test_only_the_difference_of_the_logits_matters():
    torch.manual_seed(0)
    logits = torch.randint(-256, 256, (500, 2)) / 64  # multiples of 1/64: shifting by an integer is exact
    random, shifted = torch.rand(500), logits + torch.randint(-8, 8, (500, 1))
    assert torch.equal(sample_bits(logits, random), sample_bits(shifted, random))
    assert sample_bits(torch.tensor([[-1e30, 1e30]]), torch.tensor([0.999999])).item() is True
    assert sample_bits(torch.tensor([[1e30, -1e30]]), torch.tensor([1e-7])).item() is False
