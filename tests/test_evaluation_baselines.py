"""The lines by which docs/evaluation.md runs the paper's baselines: each as it stands there, through the whole harness.

Pipelines that diffusers has are real ones of random weights. Methods with repositories of their own get stand-ins that
have their calls and files, so that what is tested is our line and our script.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from varedit.cli import main
from varedit.evaluation.benchmarks import load
from varedit.evaluation.cases import Case
from varedit.evaluation.diffusers_editor import DIPTYCH, DiffusersEditor
from varedit.evaluation.editors import make_editor, parse_options
from varedit.evaluation.features import Backbones
from varedit.evaluation.generate import generate, read_manifest, result_path
from varedit.evaluation.scores import score
from varedit.testing import TEXT_FEATURES, tiny_text_encoder

DOCUMENT = (Path(__file__).resolve().parent.parent / "docs/evaluation.md").read_text(encoding="utf-8")
SIZE = (48, 32)


def line(method):
    (found,) = re.findall(rf"^\| {re.escape(method)} \| `(.+)` \|$", DOCUMENT, re.MULTILINE)
    return found


def script(name):
    (found,) = re.findall(rf"^```python\n(# {re.escape(name)}: .*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def cases(tmp_path):
    """Two cases of one's own."""
    for value in (60, 200):
        Image.new("RGB", SIZE, (value, 90, 30)).save(tmp_path / f"{value}.png")
    rows = [{"source": f"{value}.png", "instruction": f'make "it" {value}', "key": f"k{value}"} for value in (60, 200)]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "cases.jsonl"


def run(cases, spec, output):
    """`varedit evaluate run`; the manifest's lines."""
    arguments = ["evaluate", "run", "--benchmark", cases, "--editor", spec, "-o", output, "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0
    scores = json.loads((output / "scores.json").read_text())
    assert scores["cases"]["scored"] == 2 and not scores["cases"]["failed"]
    return list(read_manifest(output).values())


# ---- tiny pipelines


def scheduler(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def clip_text():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip


def autoencoder(depth=2, **options):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16)[:depth], in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * depth, up_block_types=("UpDecoderBlock2D",) * depth, **options,
    )  # fmt: skip


def tokenizer(length):
    found, text_encoder = tiny_text_encoder()
    found.model_max_length = length
    return found, text_encoder


def flux(pipeline, in_channels):
    """A Flux pipeline: 2 x 2 latents of 4 channels are 16 channels a token; a fill pipeline has 48 with the mask."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=in_channels, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=TEXT_FEATURES, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip
    with torch.no_grad():  # or the last layer of a fresh transformer gives zeros
        torch.nn.init.normal_(transformer.proj_out.weight)
    words, text_encoder = tokenizer(512)
    vae = autoencoder(shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False)
    return pipeline(
        scheduler=scheduler(), vae=vae, text_encoder=clip_text(), tokenizer=tokenizer(32)[0],
        text_encoder_2=text_encoder, tokenizer_2=words, transformer=transformer,
    )  # fmt: skip


def pix2pix():
    from diffusers import PNDMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, in_channels=8, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    return StableDiffusionInstructPix2PixPipeline(
        vae=autoencoder(), text_encoder=clip_text(), tokenizer=tokenizer(32)[0], unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def omnigen(monkeypatch):
    import diffusers.pipelines.omnigen.pipeline_omnigen as pipeline
    import diffusers.pipelines.omnigen.processor_omnigen as processor
    from diffusers import OmniGenTransformer2DModel

    if not hasattr(processor, "transforms"):  # no torchvision here: the four steps that the processor takes from it
        steps = SimpleNamespace(
            Compose=lambda parts: lambda image: parts[2](parts[1](parts[0](image))),
            Lambda=lambda function: function,
            ToTensor=lambda: lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255,
            Normalize=lambda mean, std, inplace: lambda tensor: (tensor - 0.5) / 0.5,
        )
        monkeypatch.setattr(processor, "transforms", steps, raising=False)
        monkeypatch.setattr(pipeline, "OmniGenMultiModalProcessor", processor.OmniGenMultiModalProcessor, raising=False)
    torch.manual_seed(0)
    transformer = OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=1,
        pad_token_id=0, vocab_size=258, in_channels=4, time_step_dim=4,
        rope_scaling={"long_factor": [1.0, 1.0], "short_factor": [1.0, 1.0]},
    )  # fmt: skip
    return pipeline.OmniGenPipeline(
        transformer=transformer, scheduler=scheduler(invert_sigmas=True, num_train_timesteps=1), vae=autoencoder(4),
        tokenizer=tokenizer(512)[0],
    )  # fmt: skip


def qwen(monkeypatch):
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as pipeline
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class WithoutVideo(Qwen2VLProcessor):
        """The processor of videos needs torchvision, and no video is edited here."""

        def check_argument_for_proper_class(self, name, argument):
            return None

    # It edits at a million pixels whatever it is given; here at a thousand, for speed.
    real = pipeline.calculate_dimensions
    monkeypatch.setattr(pipeline, "calculate_dimensions", lambda area, ratio: real(32 * 48, ratio))
    words, _ = tokenizer(2048)
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words.add_special_tokens({"additional_special_tokens": special})
    start, end, picture, video = words.convert_tokens_to_ids(special[2:])
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": len(words), "max_position_embeddings": 2048, "bos_token_id": 0,
            "eos_token_id": 1, "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "fullatt_block_indexes": [0], "patch_size": 14,
        },
        vision_start_token_id=start, vision_end_token_id=end, image_token_id=picture, video_token_id=video,
    )  # fmt: skip
    processor = WithoutVideo(Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=3136), words)
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return pipeline.QwenImageEditPipeline(
        scheduler=scheduler(use_dynamic_shifting=True), vae=vae, transformer=transformer, tokenizer=words,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(), processor=processor,
    )  # fmt: skip


def shortened(spec, model, **other):
    """The documented line with another model, two steps, and small pictures."""
    _, options = parse_options(spec.removeprefix("diffusers:"))
    small = {"num_inference_steps": 2, "side": 32, "width": 48, "max_sequence_length": 16}
    options |= {name: value for name, value in small.items() if name in options} | other
    return f"diffusers:{model}?" + "&".join(f"{name}={value}" for name, value in options.items())


@pytest.fixture(scope="module")
def fill_folder(tmp_path_factory):
    """A fill pipeline as a folder, and an adapter for it as a file."""
    from diffusers import FluxFillPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("fill")
    pipeline = flux(FluxFillPipeline, 48)
    pipeline.save_pretrained(folder / "model")
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    FluxFillPipeline.save_lora_weights(
        folder / "adapter/local", transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer)
    )
    return folder


def test_instruct_pix2pix(cases, tmp_path):
    pix2pix().save_pretrained(tmp_path / "model")
    rows = run(cases, shortened(line("InstructPix2Pix"), tmp_path / "model"), tmp_path / "out")
    assert {(row["width"], row["height"]) for row in rows} == {SIZE}
    settings = json.loads((tmp_path / "out/run.json").read_text())["editor"]
    assert settings["guidance_scale"] == 7.5 and settings["image_guidance_scale"] == 1.5
    again = run(cases, shortened(line("InstructPix2Pix"), tmp_path / "model"), tmp_path / "again")
    assert [row["sha256"] for row in again] == [row["sha256"] for row in rows] and rows[0]["sha256"] != rows[1][
        "sha256"
    ]


@pytest.mark.parametrize("method", ["ICEdit", "ACE++"])
def test_fill_pipelines_with_their_adapters(method, cases, tmp_path, fill_folder):
    adapter = {"lora": fill_folder / "adapter", "lora_file": "local/pytorch_lora_weights.safetensors"}
    spec = shortened(line(method), fill_folder / "model", **adapter)
    rows = run(cases, spec, tmp_path / "out")
    assert {(row["width"], row["height"]) for row in rows} == {SIZE}
    plain = "&".join(part for part in spec.split("&") if not part.startswith("lora"))
    run(cases, plain, tmp_path / "plain")
    for row in rows:  # the adapter has its say
        assert result_path(tmp_path / "out", row["key"]).read_bytes() != (
            result_path(tmp_path / "plain", row["key"]).read_bytes()
        )


def test_flux_kontext(cases, tmp_path):
    from diffusers import FluxKontextPipeline

    flux(FluxKontextPipeline, 16).save_pretrained(tmp_path / "model")
    small = {"max_area": SIZE[0] * SIZE[1], "_auto_resize": "false", "max_sequence_length": 16}
    run(cases, shortened(line("FLUX.1 Kontext dev"), tmp_path / "model", **small), tmp_path / "out")


@pytest.mark.parametrize(("method", "make"), [("OmniGen", omnigen), ("Qwen-Image-Edit", qwen)])
def test_pipelines_that_need_torchvision_to_load(method, make, cases, tmp_path, monkeypatch):
    """Built here and handed to the editor, because loading them from a folder needs torchvision."""
    pipeline = make(monkeypatch)
    name, options = parse_options(shortened(line(method), "tiny").removeprefix("diffusers:"))
    editor, benchmark = DiffusersEditor(name, options, pipeline=pipeline), load(str(cases))
    assert generate(benchmark, editor, tmp_path / "out").failed == {}
    assert score(benchmark, tmp_path / "out", ["l1_source"], Backbones())["cases"]["scored"] == 2
    first, again = (editor.edit(benchmark.cases[0], Image.open(benchmark.cases[0].source), 3) for _ in range(2))
    other = editor.edit(benchmark.cases[1], Image.open(benchmark.cases[1].source), 3)
    assert (np.asarray(first) == np.asarray(again)).all() and (np.asarray(first) != np.asarray(other)).any()


def test_what_omnigen_and_qwen_are_asked(monkeypatch):
    source = Image.new("RGB", SIZE)
    asked = DiffusersEditor("x", {}, pipeline=omnigen(monkeypatch))._arguments("go", source)
    assert asked == {"prompt": "<img><|image_1|></img> go", "input_images": [source], "height": 32, "width": 48}
    _, options = parse_options(line("Qwen-Image-Edit"))
    editor = DiffusersEditor("x", options, pipeline=qwen(monkeypatch))
    assert editor._arguments("go", source) == {"prompt": "go", "image": source}  # the size is left to the pipeline
    assert editor.options == {"true_cfg_scale": 4, "negative_prompt": " ", "num_inference_steps": 50}
    assert DIPTYCH.startswith("A diptych with two side-by-side images of the same scene.")


# ---- what a fill pipeline is given


@pytest.fixture(scope="module")
def fill():
    from diffusers import FluxFillPipeline

    return flux(FluxFillPipeline, 48)


SOURCE = Image.new("RGB", SIZE, (10, 20, 30))
CASE = Case("k", "make it {red}", np.asarray(SOURCE))


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
def test_the_source_is_not_blacked_out(fill, layout):
    options = {"layout": layout, "num_inference_steps": 2, "max_sequence_length": 16}
    editor = DiffusersEditor("x/fill", options, pipeline=fill)
    result, seen = seen_by(fill, editor, SOURCE)
    other, seen_other = seen_by(fill, editor, Image.new("RGB", SIZE, (250, 0, 0)))
    assert result.size == other.size == SIZE
    assert (seen != seen_other).any()
    assert seen.shape[1] == 8 * 12 * (2 if layout == "diptych" else 1)


def test_fill_has_to_be_asked_for(fill):
    with pytest.raises(ValueError, match="layout=fill or layout=diptych"):
        DiffusersEditor("x", {}, pipeline=fill)
    with pytest.raises(ValueError, match="layout 'triptych' is unknown"):
        DiffusersEditor("x", {"layout": "triptych"}, pipeline=fill)


def test_diptych_is_the_source_twice_with_the_right_open(fill):
    arguments = DiffusersEditor("x/fill", {"layout": "diptych"}, pipeline=fill)._arguments(CASE.instruction, SOURCE)
    assert arguments["image"].size == (96, 32) and (arguments["width"], arguments["height"]) == (96, 32)
    assert arguments["prompt"] == DIPTYCH.replace("{instruction}", CASE.instruction)
    mask = np.asarray(arguments["mask_image"])
    assert not mask[:, :48].any() and (mask[:, 48:] == 255).all()
    assert (np.asarray(arguments["image"])[:, :48] == np.asarray(SOURCE)).all()


@pytest.mark.parametrize(
    ("options", "size"), [({"side": 64}, (96, 64)), ({"width": 96}, (96, 64)), ({"width": 90}, (96, 64)), ({}, SIZE)]
)
def test_sides_as_asked_for_in_steps_of_16(fill, options, size):
    editor = DiffusersEditor("x", {"layout": "fill", **options}, pipeline=fill)
    assert editor._sized(SOURCE).size == size


# ---- repositories of their own


def program(folder, method, **names):
    """The documented script in a folder, and its line with paths in place of names."""
    spec = line(method)
    name = re.search(r"\w+\.py", spec).group()
    (folder / name).write_text(script(name))
    spec = spec.replace("command:python ", f"command:{sys.executable} ").replace(name, str(folder / name))
    for before, after in names.items():
        spec = spec.replace(f" {before} ", f" {after} ")
    return spec


def stand_in(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_ultraedit(cases, tmp_path, monkeypatch):
    """Their diffusers has a pipeline whose call takes the mask as `mask_img`."""
    stand_in(tmp_path / "fork", "diffusers/__init__.py", """
import json
from types import SimpleNamespace
from PIL import ImageOps

class StableDiffusion3InstructPix2PixPipeline:
    @classmethod
    def from_pretrained(cls, name, torch_dtype):
        assert name == "BleachNick/SD3_UltraEdit_w_mask" and str(torch_dtype) == "torch.float16"
        return cls()

    def to(self, device):
        return self

    def __call__(self, prompt, *, image, mask_img, negative_prompt, num_inference_steps, image_guidance_scale,
                 guidance_scale, generator):
        assert image.size == mask_img.size == (512, 512) and mask_img.getextrema() == ((255, 255),) * 3
        assert (num_inference_steps, image_guidance_scale, guidance_scale) == (50, 1.5, 7.5)
        print(json.dumps([prompt, generator]))
        return SimpleNamespace(images=[ImageOps.invert(image)])
""")  # fmt: skip
    stand_in(tmp_path / "fork", "torch.py", """
float16 = "torch.float16"
class Generator:
    def __init__(self, device):
        assert device == "cuda"
    def manual_seed(self, seed):
        return seed
""")  # fmt: skip
    spec = program(tmp_path, "UltraEdit")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fork"))
    rows = run(cases, spec, tmp_path / "out")
    assert {(row["width"], row["height"]) for row in rows} == {(512, 512)}  # brought back by scoring
    assert json.loads((tmp_path / "out/scores.json").read_text())["cases"]["resized"] == 2
    assert Image.open(result_path(tmp_path / "out", "k60")).getpixel((5, 5)) == (195, 165, 225)


def test_anysd(cases, tmp_path, monkeypatch):
    for name in ("anysd/__init__.py", "anysd/src/__init__.py"):
        stand_in(tmp_path / "AnySD", name, "")
    stand_in(tmp_path / "AnySD", "anysd/src/model.py", """
import random
from PIL import Image

class Generator(random.Random):
    def manual_seed(self, seed):
        self.seed(seed)

class AnySDEidtPipeline:
    def __init__(self):
        self.generator = Generator(0)

    def edit(self, image_url, prompt, save_path, num_inference_steps=None):
        image = Image.open(image_url).convert("RGB").resize((512, 512))
        image.putpixel((0, 0), (len(prompt), self.generator.randrange(256), 0))
        image.save(save_path)
        return [image]
""")  # fmt: skip
    spec = program(tmp_path, "AnySD")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "AnySD"))
    rows = run(cases, spec, tmp_path / "out")
    import random

    for row in rows:
        length = len(f'make "it" {row["key"][1:]}')
        expected = (length, random.Random(row["seed"]).randrange(256), 0)
        assert Image.open(result_path(tmp_path / "out", row["key"])).getpixel((0, 0)) == expected


def test_editar(cases, tmp_path):
    """Its demo reads and writes ./examples, with the names and options that it has there."""
    for name in (
        "checkpoints/editar/editar_release.pt", "pretrained_models/vq_ds16_t2i.pt", "pretrained_models/t5-ckpt/x"
    ):  # fmt: skip
        stand_in(tmp_path / "clone", name, "")
    stand_in(tmp_path / "clone", "autoregressive/sample/sample_edit_example.py", """
import argparse, glob, os
from PIL import Image
parser = argparse.ArgumentParser()
parser.add_argument("--vq-ckpt", default="./pretrained_models/vq_ds16_t2i.pt")
parser.add_argument("--gpt-ckpt", default=None)
parser.add_argument("--cfg-scale", type=float, default=1)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--t5-path", default="pretrained_models/t5-ckpt")
args = parser.parse_args()
assert all(map(os.path.exists, (args.vq_ckpt, args.gpt_ckpt, args.t5_path)))
(path,) = glob.glob(os.path.join("./examples", "*_input.png"))
text = open(path[:-10] + "_txt.txt").read()
name = os.path.basename(path)[:-4]
Image.new("RGB", (512, 512), (len(text), args.seed % 256, 0)).save(f"./examples/{name}_sample_txt_{args.cfg_scale}.png")
""")  # fmt: skip
    rows = run(cases, program(tmp_path, "EditAR", EditAR=tmp_path / "clone"), tmp_path / "out")
    for row in rows:
        color = Image.open(result_path(tmp_path / "out", row["key"])).getpixel((7, 7))
        assert color == (len(f'make "it" {row["key"][1:]}'), row["seed"] % 256, 0)


def test_a_pipeline_without_its_packages_is_named(tmp_path, fill_folder):
    """A folder that is no pipeline, an adapter that does not fit, an option that the call does not have."""
    shutil.copytree(fill_folder / "model", tmp_path / "broken")
    (tmp_path / "broken/model_index.json").write_text("{}")
    for spec, message in (
        (f"diffusers:{tmp_path / 'broken'}?layout=fill", "cannot load the pipeline"),
        (f"diffusers:{fill_folder / 'model'}?layout=fill&lora={tmp_path}", "cannot load the pipeline"),
        (f"diffusers:{fill_folder / 'model'}?layout=fill&colour=red", "option 'colour' is unknown to FluxFill"),
        (f"diffusers:{fill_folder / 'model'}?layout=fill&side=3", "side is 3: use a whole number"),
        (f"diffusers:{fill_folder / 'model'}?layout=fill&dtype=int8", "dtype 'int8' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            make_editor(spec, "cpu")
