"""Tiny networks of random weights that scores are made with, for tests."""

import torch
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from varedit.evaluation.features import Clip
from varedit.testing import tiny_text_encoder


def tiny_clip() -> Clip:
    torch.manual_seed(0)
    tokenizer, _ = tiny_text_encoder()
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 258, "max_position_embeddings": 24, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(
        text_config=text | {"pad_token_id": 0}, vision_config=tower | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )  # fmt: skip
    return Clip(CLIPModel(config).eval(), tokenizer)


def tiny_vit() -> ViTModel:
    torch.manual_seed(1)
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                       image_size=32, patch_size=16)  # fmt: skip
    return ViTModel(config, add_pooling_layer=False).eval()
