"""Editors: ours, diffusers pipelines, an endpoint, a command, a folder."""

import base64
import email.parser
import email.policy
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from varedit.evaluation.cases import Case
from varedit.evaluation.editors import DiffusersEditor, EditFailed, make_editor

SOURCE = Image.new("RGB", (48, 32), (10, 20, 30))
CASE = Case("k1", 'make "it" red; {seed} $HOME', np.asarray(SOURCE), extra={"file": "7/k1.png"})


class Endpoint:
    """An OpenAI-style image endpoint: inverts the picture, and keeps the form fields it was sent."""

    def __init__(self, answer=None):
        self.forms = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
                message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
                form = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
                        for part in message.iter_parts()}  # fmt: skip
                outer.forms.append((self.path, form, self.headers.get("Authorization")))
                status, text = answer or (200, self.inverted(form["image"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def inverted(self, data):
                pixels = 255 - np.asarray(Image.open(io.BytesIO(data)))
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                return json.dumps({"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]})

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def test_endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Endpoint() as endpoint:
        editor = make_editor(f"openai:{endpoint.url}?model=gpt-image-1&quality=high")
        result = editor.edit(CASE, SOURCE, 5)
    assert np.asarray(result)[0, 0].tolist() == [245, 235, 225]
    path, form, key = endpoint.forms[0]
    assert path == "/v1/images/edits" and key == "Bearer secret"
    assert form["prompt"].decode() == CASE.instruction and form["model"] == b"gpt-image-1" and form["seed"] == b"5"
    assert form["quality"] == b"high" and "secret" not in json.dumps(editor.settings)


@pytest.mark.parametrize(
    ("answer", "message"),
    [((429, "too many"), "429: too many"), ((200, "{}"), "no picture"),
     ((200, '{"data":[{"b64_json":"AAAA"}]}'), "no picture"),
     ((200, '{"data":[{"url":"file:///etc/passwd"}]}'), "no picture")],
)  # fmt: skip
def test_endpoint_that_fails_is_named(answer, message):
    with Endpoint(answer) as endpoint, pytest.raises(EditFailed, match=message):
        make_editor(f"openai:{endpoint.url}").edit(CASE, SOURCE, 0)


def test_command_gets_its_fields_and_no_shell(tmp_path):
    script = tmp_path / "edit.py"
    script.write_text(
        "import sys, json\nfrom PIL import Image, ImageOps\n"
        "ImageOps.invert(Image.open(sys.argv[1])).save(sys.argv[3])\n"
        "open(sys.argv[5], 'w').write(json.dumps([sys.argv[2], sys.argv[4]]))\n"
    )
    seen = tmp_path / "seen.json"
    template = f"{sys.executable} {script} {{source}} {{instruction}} {{output}} s={{seed}} {seen}"
    result = make_editor(f"command:{template}").edit(CASE, SOURCE, 7)
    assert np.asarray(result)[0, 0].tolist() == [245, 235, 225]
    assert json.loads(seen.read_text()) == [CASE.instruction, "s=7"]


@pytest.mark.parametrize(
    ("program", "message"),
    [("import sys; sys.exit('no memory')", "ended with 1: no memory"), ("pass", "left no picture")],
)
def test_command_that_fails_is_named(program, message):
    editor = make_editor(f'command:{sys.executable} -c "{program}" {{source}} {{instruction}} {{output}}')
    with pytest.raises(EditFailed, match=message):
        editor.edit(CASE, SOURCE, 0)


def test_folder_of_results(tmp_path):
    (tmp_path / "7").mkdir()
    Image.new("RGB", (5, 5), (1, 2, 3)).save(tmp_path / "7/k1.png")
    assert make_editor(f"folder:{tmp_path}").edit(CASE, SOURCE, 0).size == (5, 5)
    Image.new("RGB", (6, 6)).save(tmp_path / "k1.webp")
    assert make_editor(f"folder:{tmp_path}").edit(CASE, SOURCE, 0).size == (6, 6)
    assert make_editor(f"folder:{tmp_path}/7/{{key}}.png").edit(CASE, SOURCE, 0).size == (5, 5)
    with pytest.raises(EditFailed, match="no result"):
        make_editor(f"folder:{tmp_path}/{{key}}_x.png").edit(CASE, SOURCE, 0)


def test_known_editors():
    assert make_editor("identity").edit(CASE, SOURCE, 0) is SOURCE
    with pytest.raises(EditFailed, match="known answers"):
        make_editor("oracle").edit(CASE, SOURCE, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("photoshop", "is unknown"), ("identity:x", "is unknown"), ("diffusers:", "is unknown"),
     ("openai:localhost", "full address"), ("command:edit {source} {output}", "lacks {instruction}"),
     ("folder:/no/such/folder", "does not exist"), ("varedit:x?colour=3", "option 'colour'")],
)  # fmt: skip
def test_bad_specs_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        make_editor(spec)


@pytest.fixture(scope="module")
def flux_fill():
    """A real FluxFill pipeline of random weights: 2 x 2 latents of 4 channels, 48 inputs a token with the mask."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from varedit.testing import TEXT_FEATURES, tiny_text_encoder

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=48, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=TEXT_FEATURES, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.0,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    tokenizer, text_encoder = tiny_text_encoder()
    tokenizer.model_max_length = 32
    text = CLIPTextConfig(vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=1,
                          pad_token_id=0)  # fmt: skip
    return FluxFillPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
        text_encoder_2=text_encoder, tokenizer_2=tokenizer, transformer=transformer,
    )  # fmt: skip


def seen_by(pipeline, editor, source):
    """What the transformer gets of the masked picture, and the result."""
    inputs = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["hidden_states"][..., 16:32]), with_kwargs=True
    )
    try:
        return editor.edit(CASE, source, 0), inputs[0]
    finally:
        hook.remove()


@pytest.mark.parametrize("layout", ["diptych", "fill"])
def test_fill_pipelines(flux_fill, layout):
    options = {"layout": layout, "num_inference_steps": 2, "max_sequence_length": 16}
    editor = DiffusersEditor("x/fill", options, pipeline=flux_fill)
    result, seen = seen_by(flux_fill, editor, SOURCE)
    other, seen_other = seen_by(flux_fill, editor, Image.new("RGB", (48, 32), (250, 0, 0)))
    assert result.size == other.size == (48, 32)
    assert (seen != seen_other).any()  # the source is not blacked out
    tokens = 8 * 12 * (2 if layout == "diptych" else 1)
    assert seen.shape[1] == tokens


def test_fill_has_to_be_asked_for(flux_fill):
    with pytest.raises(ValueError, match="layout=fill or layout=diptych"):
        DiffusersEditor("x", {}, pipeline=flux_fill)
    with pytest.raises(ValueError, match="is unknown"):
        DiffusersEditor("x", {"layout": "triptych"}, pipeline=flux_fill)


def test_diptych_is_the_source_twice_with_the_right_open(flux_fill):
    editor = DiffusersEditor("x/fill", {"layout": "diptych"}, pipeline=flux_fill)
    arguments = editor._arguments(CASE.instruction, SOURCE)
    assert arguments["image"].size == (96, 32) and (arguments["width"], arguments["height"]) == (96, 32)
    assert arguments["prompt"].startswith("A diptych") and CASE.instruction in arguments["prompt"]
    mask = np.asarray(arguments["mask_image"])
    assert not mask[:, :48].any() and (mask[:, 48:] == 255).all()
    assert (np.asarray(arguments["image"])[:, :48] == np.asarray(SOURCE)).all()


@pytest.fixture(scope="module")
def pix2pix(tmp_path_factory):
    """A real InstructPix2Pix pipeline of random weights, saved as a folder."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from varedit.testing import tiny_text_encoder

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, in_channels=8, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    tokenizer, _ = tiny_text_encoder()
    tokenizer.model_max_length = 32
    text = CLIPTextConfig(vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=1,
                          pad_token_id=0)  # fmt: skip
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pix2pix")
    pipeline.save_pretrained(folder)
    return folder


def test_a_real_diffusers_pipeline(pix2pix):
    editor = make_editor(
        f"diffusers:{pix2pix}?num_inference_steps=2&guidance_scale=2.0&image_guidance_scale=1.2", "cpu"
    )
    first, again, other = (np.asarray(editor.edit(CASE, SOURCE, seed)) for seed in (1, 1, 2))
    assert first.shape == (32, 48, 3) and (first == again).all() and (first != other).any()
    assert editor.settings["guidance_scale"] == 2.0


def test_a_pipeline_that_is_not_there():
    with pytest.raises(ValueError, match="cannot load the pipeline"):
        make_editor("diffusers:no/such-pipeline", "cpu")
