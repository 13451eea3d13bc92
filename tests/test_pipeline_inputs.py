"""The edit call refuses what it cannot use, in one line; models are found by name, or not."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varedit.pipeline import VAREditPipeline, default_device, load_pipeline
from varedit.testing import tiny_image_tokenizer, tiny_pipeline, tiny_transformer

SIZE = 128
FEATURES = 32
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pipeline() -> VAREditPipeline:
    return tiny_pipeline(size=SIZE)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"guidance_scale": -0.1}, "guidance_scale -0.1 must be 0 or more"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale inf"),
        ({"temperature": -1}, "temperature -1 must be 0 or more"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_p": 0}, "top_p 0 must be above 0"),
        ({"top_p": 1.5}, "top_p 1.5 must be above 0 and at most 1"),
        ({"top_p": float("nan")}, "top_p nan"),
        ({"seed": -1}, "seed -1 .* between 0"),
        ({"seed": 2**63}, "seed 9223372036854775808 .* between 0"),
        ({"seed": [0, -5]}, "seed -5 .* between 0"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"seed": "abc"}, "seed 'abc'"),
        ({"size": 100}, "size 100 .* choose 128, 256, 512"),
        ({"fit": "stretch"}, "fit 'stretch' is unknown"),
        ({"output_type": "latent"}, "output_type 'latent' is unknown; use 'pil' or 'bits'"),
        ({"prompt": ""}, "is empty"),
        ({"prompt": " \n "}, "is empty"),
        ({"prompt": ["sepia", ""]}, "is empty"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt": "x" * 10_000}, "10000 characters; shorten it to at most 2000"),
        ({"prompt": "x" * 100}, "101 tokens; shorten it to at most 64"),
        ({"prompt_embeds": torch.zeros(3, FEATURES)}, "either prompt or prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(3, 7)}, r"\(3, 7\); pass \(tokens, 32\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, FEATURES)}, r"\(1, 3, 32\); pass \(tokens, 32\)"),
        ({"prompt": None, "prompt_embeds": [torch.zeros(0, FEATURES)]}, r"\(0, 32\); pass \(tokens, 32\)"),
        ({"prompt": None, "prompt_embeds": torch.zeros(65, FEATURES)}, "65 tokens; .* at most 64"),
        ({"image": "no such file.png"}, "no such file.png.* does not exist"),
        ({"image": b"not an image"}, "not an image"),
    ],
)
def test_unusable_input_is_named_with_its_fix(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        pipeline(**{"image": PICTURE, "prompt": "sepia", "seed": 0} | arguments)
    assert "\n" not in str(caught.value)


def test_numpy_seeds_are_seeds(pipeline):
    edited = pipeline(PICTURE, "sepia", seed=[np.int64(4), 4])
    assert edited.seeds == [4, 4]
    assert all(torch.equal(*pair) for pair in zip(*edited.bits, strict=True))


def test_size_beyond_the_model_is_refused():
    pipeline = tiny_pipeline(size=SIZE, num_levels=7)
    with pytest.raises(ValueError, match=re.escape("size 512 is not one that this model can use; choose 128, 256")):
        pipeline(PICTURE, "sepia", size=512)


def test_a_prompt_without_a_text_encoder_is_refused(pipeline):
    bare = VAREditPipeline(pipeline.transformer, pipeline.image_tokenizer, size=SIZE)
    with pytest.raises(ValueError, match="no text encoder; pass prompt_embeds"):
        bare(PICTURE, "sepia")


def test_parts_of_different_models_are_refused():
    with pytest.raises(ValueError, match="predicts 12 bits a token, the image tokenizer has 16"):
        VAREditPipeline(tiny_transformer(num_bits=12), tiny_image_tokenizer())


# -- loading by name -----------------------------------------------------------------------------------------------


def test_load_pipeline_from_a_folder(pipeline, tmp_path: Path):
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, device="cpu")
    assert loaded.transformer.dtype == torch.float32
    expected = pipeline(PICTURE, "sepia", seed=1)
    found = loaded(PICTURE, "sepia", seed=1)
    assert all(torch.equal(*pair) for pair in zip(found.bits[0], expected.bits[0], strict=True))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dtype": torch.float16}, "float16 is not supported"),
        ({"device": "abacus"}, "device 'abacus' is not usable"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not usable"),
    ],
)
def test_load_pipeline_refuses_what_cannot_run(tmp_path: Path, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_pipeline(tmp_path, **{"device": "cpu"} | arguments)


def test_load_pipeline_names_the_model_that_it_cannot_load(tmp_path: Path):
    for name in (str(tmp_path), str(tmp_path / "no such folder"), "/no/such/folder", "someone/no-such-model"):
        with pytest.raises(ValueError, match=re.escape(name)) as caught:
            load_pipeline(name, device="cpu")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_default_device_is_usable():
    torch.empty(1, device=default_device())
