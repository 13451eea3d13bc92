"""Instruction -> text features, with any transformers encoder that returns `last_hidden_state`.

FLAN-T5-XL for the released models, a small sentence encoder for the default one. Features are unpadded, as the
released code computes them: an instruction's features do not depend on what else is in the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    max_tokens: int,
    batch_size: int = 1,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Encode each instruction to its states, (T, F) in the encoder's dtype, T its own length with end tokens.

    Equal instructions are encoded once. With `batch_size` 1 each is encoded alone, so that its bits never depend on
    the others; training may use more. `device` is where the encoder computes, its own by default (under offload its
    weights lie elsewhere).

    Raises:
        ValueError: an instruction of more than `max_tokens` tokens.
    """
    tokens = {prompt: tokenizer(prompt)["input_ids"] for prompt in dict.fromkeys(prompts)}
    for prompt, ids in tokens.items():
        if len(ids) > max_tokens:
            raise ValueError(
                f"the instruction {prompt[:40]!r}... has {len(ids)} tokens; shorten it to at most {max_tokens}"
            )
    device = text_encoder.device if device is None else device
    encoded: dict[str, Tensor] = {}
    waiting = sorted(tokens, key=lambda prompt: len(tokens[prompt]))
    for first in range(0, len(waiting), batch_size):
        batch = waiting[first : first + batch_size]
        padded, mask = pad_text([torch.tensor(tokens[prompt])[:, None] for prompt in batch])
        states = text_encoder(
            input_ids=padded[..., 0].to(device), attention_mask=mask.long().to(device)
        ).last_hidden_state
        encoded |= {prompt: states[index, : len(tokens[prompt])] for index, prompt in enumerate(batch)}
    return [encoded[prompt] for prompt in prompts]


def pad_text(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Right-pad (T_i, F) features with zeros to (B, T, F); the mask, bool (B, T), is True where there is text."""
    text_BTF = torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True)
    lengths = torch.tensor([len(part) for part in features], device=text_BTF.device)
    return text_BTF, torch.arange(text_BTF.shape[1], device=text_BTF.device) < lengths[:, None]
