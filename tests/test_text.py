"""Instruction features: an instruction's own, whatever else is encoded with it."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerBase

from varedit.testing import TEXT_FEATURES, tiny_text_encoder
from varedit.text import encode_prompts, pad_text

PROMPTS = ["sepia", "make the sky a little more red, please", "add snow", "x", "remove the dog on the left"]


def tiny_bert() -> tuple[PreTrainedTokenizerBase, BertModel]:
    """An encoder with absolute positions, as the small sentence encoders have."""
    tokenizer, _ = tiny_text_encoder()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_FEATURES,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    return tokenizer, BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="module", params=[tiny_text_encoder, tiny_bert], ids=["t5", "bert"])
def encoder(request) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    return request.param()


def count_calls(model: torch.nn.Module) -> list[int]:
    """A list that grows by each forward's batch size."""
    calls: list[int] = []
    model.register_forward_hook(
        lambda module, arguments, options, output: calls.append(len(options["input_ids"])), with_kwargs=True
    )
    return calls


def test_states_are_the_encoders_own_unpadded(encoder):
    tokenizer, text_encoder = encoder
    for prompt, states in zip(PROMPTS, encode_prompts(PROMPTS, tokenizer, text_encoder, 64)):
        with torch.no_grad():
            expected = text_encoder(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        assert states.shape == (len(prompt) + 1, TEXT_FEATURES)  # a token a byte and the end token
        assert torch.equal(states, expected)


def test_by_default_the_others_change_nothing(encoder):
    together = encode_prompts(PROMPTS, *encoder, 64)
    for prompt, states in zip(PROMPTS, together):
        assert torch.equal(states, encode_prompts([prompt], *encoder, 64)[0])


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_a_padded_batch_equals_each_alone(encoder, batch_size):
    alone = encode_prompts(PROMPTS, *encoder, 64)
    padded = encode_prompts(PROMPTS, *encoder, 64, batch_size=batch_size)
    for states, expected in zip(padded, alone):
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


def test_equal_instructions_are_encoded_once():
    tokenizer, text_encoder = tiny_text_encoder()
    calls = count_calls(text_encoder)
    states = encode_prompts(["sepia", "add snow", "sepia", "sepia"], tokenizer, text_encoder, 64)
    assert calls == [1, 1]
    assert torch.equal(states[0], states[2]) and torch.equal(states[0], states[3])
    assert not torch.equal(states[0], states[1][: len(states[0])])
    encode_prompts(PROMPTS, tokenizer, text_encoder, 64, batch_size=2)
    assert calls == [1, 1, 2, 2, 1]


def test_nothing_to_encode():
    assert encode_prompts([], *tiny_text_encoder(), 64) == []


def test_an_instruction_of_too_many_tokens_is_refused(encoder):
    assert len(encode_prompts(["x" * 9], *encoder, 10)[0]) == 10
    with pytest.raises(ValueError, match="'xxxxxxxxxx'... has 11 tokens; shorten it to at most 10"):
        encode_prompts(["sepia", "x" * 10], *encoder, 10)


def test_bfloat16_states_are_finite_and_near(encoder):
    tokenizer, text_encoder = encoder
    exact = encode_prompts(PROMPTS, tokenizer, text_encoder, 64)
    rounded = encode_prompts(PROMPTS, tokenizer, type(text_encoder)._from_config(text_encoder.config).eval(), 64)
    assert not torch.allclose(exact[0], rounded[0])  # other weights: the comparison below can fail
    text_encoder.to(torch.bfloat16)
    try:
        rounded = encode_prompts(PROMPTS, tokenizer, text_encoder, 64)
    finally:
        text_encoder.to(torch.float32)
    for states, expected in zip(rounded, exact):
        assert states.dtype == torch.bfloat16 and states.isfinite().all()
        assert torch.nn.functional.cosine_similarity(states.float(), expected, dim=-1).min() > 0.99


def test_an_offloaded_encoder_computes_where_it_is_told(encoder):
    tokenizer, text_encoder = encoder
    expected = encode_prompts(PROMPTS, tokenizer, text_encoder, 64)
    offloaded = copy.deepcopy(text_encoder)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    for states, wanted in zip(encode_prompts(PROMPTS, tokenizer, offloaded, 64, device="cpu"), expected):
        assert torch.equal(states, wanted)


def test_encoding_builds_no_graph(encoder):
    assert not encode_prompts(["sepia"], *encoder, 64)[0].requires_grad


def test_pad_text():
    text_BTF, mask_BT = pad_text([torch.ones(2, 3), torch.ones(4, 3) * 2])
    assert text_BTF.shape == (2, 4, 3) and mask_BT.dtype == torch.bool
    assert mask_BT.tolist() == [[True, True, False, False], [True] * 4]
    assert text_BTF[0, 2:].eq(0).all() and text_BTF[0, :2].eq(1).all() and text_BTF[1].eq(2).all()
