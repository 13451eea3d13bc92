"""Tiny real components, built in process: for tests, examples and benchmarks. No download, deterministic."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.pipeline import VAREditPipeline
from varedit.transformer import VAREditTransformer

TEXT_FEATURES = 32


def tiny_transformer(seed: int = 0, **overrides) -> VAREditTransformer:
    """Two blocks of width 64 with weights large enough that every part matters."""
    torch.manual_seed(seed)
    config = {
        "num_bits": 16, "width": 64, "num_blocks": 2, "num_heads": 2, "text_features": TEXT_FEATURES,
        "num_text_heads": 2, "max_text_tokens": 64, "num_levels": 13,
    }  # fmt: skip
    model = VAREditTransformer(**(config | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "modulation_table")):
                parameter.normal_(std=0.3)
        model.head.weight.mul_(4)
    return model.eval()


def tiny_image_tokenizer(seed: int = 0, **overrides) -> VAREditImageTokenizer:
    """Stride 8 with 2 x 2 patchify, 4 bits a code."""
    torch.manual_seed(seed)
    config = {
        "num_code_bits": 4, "base_width": 32, "multipliers": (1, 1), "num_blocks": 1, "stem_patch": 4, "patch_size": 2,
        "num_groups": 8,
    }  # fmt: skip
    return VAREditImageTokenizer(**(config | overrides)).eval()


def tiny_text_encoder(seed: int = 0) -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    """A T5 encoder of two layers and a tokenizer that reads bytes."""
    torch.manual_seed(seed)
    vocabulary = {"<pad>": 0, "</s>": 1} | {
        character: index + 2 for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    config = T5Config(
        vocab_size=len(vocabulary), d_model=TEXT_FEATURES, d_kv=16, d_ff=64, num_layers=2, num_heads=2, use_cache=False
    )
    return tokenizer, T5EncoderModel(config).eval()


def tiny_pipeline(seed: int = 0, size: int = 128, **transformer_overrides) -> VAREditPipeline:
    """A whole pipeline of random weights; edits in a fraction of a second."""
    tokenizer, text_encoder = tiny_text_encoder(seed)
    pipeline = VAREditPipeline(
        tiny_transformer(seed, **transformer_overrides), tiny_image_tokenizer(seed), text_encoder, tokenizer, size=size
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
