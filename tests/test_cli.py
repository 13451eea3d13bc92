"""The `varedit` command, run in process on a tiny model folder."""

import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from varedit.cli import doctor as doctor_module
from varedit.cli import edit as edit_module
from varedit.cli.edit import amount_changed


@pytest.fixture
def photo(tmp_path) -> Path:
    ramp = np.linspace(0, 255, 60 * 90 * 3).reshape(60, 90, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# -- what is loaded


@pytest.mark.parametrize(
    "command", [[], ["edit"], ["convert"], ["data"], ["data", "synth"], ["doctor"], ["inspect", "attention"]]
)
def test_help_loads_neither_torch_nor_diffusers(command):
    code = (
        "import sys\nfrom varedit.cli import main\n"
        f"try: main({[*command, '--help']})\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("command", [[], ["session"], ["data"]])
def test_a_command_without_its_rest_is_help_alone(varedit, command):
    ran = varedit(*command)
    assert (ran.code, ran.err) == (2, "") and "Usage" in ran.out


def test_version(varedit):
    assert re.fullmatch(r"varedit \d+\.\d+\.\d+\S*\n", varedit("--version").out)


# -- edits

PIXELS_ALONE = ["--no-manifest", "--preserve=off", "--device=cpu"]  # the model's own picture, without what was asked


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


def test_edit_writes_beside_the_input_and_reports(varedit, model_folder, photo):
    ran = varedit("edit", photo, "make it brighter", "--model", model_folder)
    assert ran.code == 0, ran.err
    edited = photo.with_name("photo.edited.png")
    with Image.open(edited) as image:
        assert image.size == (90, 60) and image.format == "PNG"
    assert str(edited) in ran.out and "90 x 60" in ran.out and re.search(r"seed \d+", ran.out)
    assert re.search(r"edited in [\d.]+ s", ran.out) and "of 255 levels" in ran.out
    assert len(re.findall(r"^scale +\d/5", ran.err, re.MULTILINE)) == 5


def test_same_seed_same_file_and_another_seed_another(varedit, model_folder, photo, tmp_path):
    files = [tmp_path / f"{name}.png" for name in "abcd"]
    common = ["edit", photo, "blur", "--model", model_folder]
    for file, seed, how in zip(files, (7, 7, 7, 8), ([], [], PIXELS_ALONE, PIXELS_ALONE), strict=True):
        assert varedit(*common, "--seed", seed, *how, "-o", file).code == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert pixels(files[2]) != pixels(files[3])


def test_reported_seed_repeats_the_edit(varedit, model_folder, photo, tmp_path):
    ran = varedit("edit", photo, "blur", "--model", model_folder, "-o", tmp_path / "a.png")
    seed = re.search(r"seed (\d+)", ran.out).group(1)
    varedit("edit", photo, "blur", "--model", model_folder, "-o", tmp_path / "b.png", "--seed", seed)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_settings_left_out_are_the_models_own(varedit, model_folder, photo, tmp_path):
    from varedit.pipeline import VAREditPipeline

    config = VAREditPipeline.load_config(str(model_folder))
    explicit = [f"--{name.replace('_', '-')}={config[name]}" for name in ("guidance_scale", "temperature", "top_p")]
    explicit += [f"--size={config['size']}", f"--fit={config['fit']}", "--dtype=float32", "--device=cpu"]
    common = ["edit", photo, "blur", "--model", model_folder, "--seed", 1]
    varedit(*common, "-o", tmp_path / "a.png", "--device=cpu")
    varedit(*common, "-o", tmp_path / "b.png", *explicit)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "option",
    ["--guidance-scale=1", "--temperature=3", "--top-p=0.6", "--size=256", "--fit=square", "--dtype=bfloat16"],
)
def test_every_setting_reaches_the_model(option, varedit, model_folder, photo, tmp_path):
    common = ["edit", photo, "blur", "--model", model_folder, "--seed", 1, "--temperature=1", *PIXELS_ALONE]
    assert varedit(*common, "-o", tmp_path / "a.png").code == 0
    assert varedit(*common, "-o", tmp_path / "b.png", option).code == 0
    assert pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")


def test_animated_gif_edits_its_first_frame_and_says_so(varedit, model_folder, tmp_path):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    ran = varedit("edit", tmp_path / "moving.gif", "blur", "--model", model_folder)
    assert ran.code == 0
    assert "note: " in ran.err and "frame" in ran.err
    assert (tmp_path / "moving.edited.png").exists()  # a GIF is not written


def test_existing_output_is_kept_unless_overwritten(varedit, model_folder, photo, tmp_path):
    (tmp_path / "photo.edited.png").write_bytes(b"precious")
    arguments = ["edit", photo, "blur", "--model", model_folder]
    varedit(*arguments).assert_refused("photo.edited.png", "--overwrite")
    assert (tmp_path / "photo.edited.png").read_bytes() == b"precious"
    assert varedit(*arguments, "--overwrite").code == 0
    assert (tmp_path / "photo.edited.png").read_bytes() != b"precious"


def test_interrupt_between_scales_leaves_nothing(varedit, model_folder, photo, tmp_path, monkeypatch):
    def press_ctrl_c(step):
        if step.scale == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(edit_module, "report_scale", press_ctrl_c)
    assert varedit("edit", photo, "blur", "--model", model_folder).code == 130
    assert list(tmp_path.iterdir()) == [photo]


def test_amount_changed_counts_levels_and_pixels():
    before = Image.new("RGB", (40, 300), (100, 100, 100))
    after = before.copy()
    after.paste((100, 130, 100), (0, 0, 40, 30))  # a tenth of the pixels, one channel by 30
    after.paste((101, 100, 100), (0, 290, 40, 300))  # too little to notice
    mean, share = amount_changed(before, after)
    assert share == pytest.approx(0.1)
    assert mean == pytest.approx((30 * 0.1 + 1 / 30) / 3)
    assert amount_changed(before, before) == (0, 0)


# -- doctor


def test_doctor_reports_this_machine(varedit):
    findings = json.loads(varedit("doctor", "--json").out)
    devices = {device["device"]: device for device in findings["devices"]}
    assert devices["cpu"]["gflops"]["float32"] > 0
    assert 0 < findings["memory_gib"]["available"] <= findings["memory_gib"]["total"]
    assert findings["packages"]["torch"] and findings["cores"] >= 1
    models = {model["model"]: model for model in findings["models"]}
    assert models["8b-512"]["weights_gib"] > models["2b-512"]["weights_gib"] > 4


def test_doctor_judges_each_device_by_the_precision_used_there():
    weights = next(one["weights_gib"] for one in doctor_module._models({}) if one["model"] == "2b-512")
    memory = {"cuda:0": 1.5 * weights, "cpu": 1.5 * weights}
    two = next(one for one in doctor_module._models(memory) if one["model"] == "2b-512")
    assert two["fits"] == ["cuda:0"] and two["fits_in_bfloat16"] == ["cuda:0", "cpu"]
    two = next(one for one in doctor_module._models({"cpu": 2.5 * weights}) if one["model"] == "2b-512")
    assert two["fits"] == ["cpu"]


def test_doctor_knows_a_text_encoder_by_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    ((name, present),) = doctor_module._text_encoders().items()
    repository = tmp_path / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    for file in ("config.json", "model.safetensors.index.json", "a.safetensors"):
        assert not present
        (snapshot / file).write_text(json.dumps({"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}))
        present = doctor_module._text_encoders()[name]
    assert not present
    (snapshot / "b.safetensors").write_text("")
    assert doctor_module._text_encoders()[name]


def test_doctor_in_words(varedit):
    ran = varedit("doctor")
    assert ran.code == 0
    for word in ("cores", "cpu", "float32", "torch", "2b-512", "fit"):
        assert word in ran.out


# -- bad input


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated_jpeg() -> bytes:
    import io

    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[:600]


BAD_IMAGES = {
    "zero-size.png": b"",
    "not-an-image.png": b"hello, I am text",
    "truncated.jpg": truncated_jpeg(),
    "300-megapixels.png": png_header_only(20_000, 15_000),
    "no-width.png": png_header_only(0, 10),
}


@pytest.mark.parametrize("name", [*BAD_IMAGES, "missing.png"])
def test_bad_image(name, varedit, model_folder, tmp_path):
    if name in BAD_IMAGES:
        (tmp_path / name).write_bytes(BAD_IMAGES[name])
    before = sorted(tmp_path.iterdir())
    varedit("edit", tmp_path / name, "blur", "--model", model_folder).assert_refused(name)
    assert sorted(tmp_path.iterdir()) == before


def test_folder_in_place_of_an_image(varedit, model_folder, tmp_path):
    varedit("edit", tmp_path, "blur", "--model", model_folder).assert_refused(str(tmp_path), "folder")


BAD_SETTINGS = {
    "--guidance-scale": ["-1", "-0.001", "nan", "much"],
    "--temperature": ["-0.5", "nan"],
    "--top-p": ["0", "-0.1", "1.01", "nan"],
    "--seed": ["-1", "99999999999999999999", "1.5"],
    "--size": ["100", "0", "-256", "2048"],
    "--device": ["teapot", "cuda:77"],
    "--dtype": ["float16", "int8"],
    "--fit": ["stretch"],
    "--model": ["no/such/folder"],
    "--nonsense": ["1"],
}


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in BAD_SETTINGS.items() for v in values])
def test_bad_setting(option, value, varedit, model_folder, photo, tmp_path):
    model = [] if option == "--model" else ["--model", model_folder]
    ran = varedit("edit", photo, "blur", *model, f"{option}={value}")
    parsed = value not in (
        "much",
        "1.5",
        "1",
    )  # what the parser refuses names the option; the value is on the line typed
    ran.assert_refused(value if parsed else option)
    assert list(tmp_path.iterdir()) == [photo]


@pytest.mark.parametrize("instruction", ["", "  \n", "x" * 10_000])
def test_bad_instruction(instruction, varedit, model_folder, photo, tmp_path):
    varedit("edit", photo, instruction, "--model", model_folder).assert_refused("instruction")
    assert list(tmp_path.iterdir()) == [photo]


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has none"), "CUDA out of memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB). Tried to allocate 2 GB"), "MPS backend out of"),
        (RuntimeError("[a.cpp:1] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"), "not enough"),
        (RuntimeError("[a.cpp:1] data. DefaultCPUAllocator: not enough memory: you tried"), "not enough"),
    ],
)
def test_a_full_device_is_one_line(varedit, photo, monkeypatch, error, short):
    def full(*_):
        raise error

    monkeypatch.setattr(edit_module, "load_model", full)
    varedit("edit", photo, "blur").assert_refused(short, ": take a smaller size", "--device cpu")


def test_a_proxy_that_refuses_is_one_line(photo):
    refusing = socket.create_server(("127.0.0.1", 0))

    def refuse():
        while True:
            connection, _ = refusing.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    threading.Thread(target=refuse, daemon=True).start()
    proxy = f"http://127.0.0.1:{refusing.getsockname()[1]}"
    code = f"from varedit.cli import main; main(['edit', {str(photo)!r}, 'blur', '--model', 'nobody/nothing'])"
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HTTPS_PROXY": proxy, "https_proxy": proxy}
    environment = {
        name: value for name, value in environment.items() if name not in ("NO_PROXY", "no_proxy", "HF_ENDPOINT")
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"^error: cannot load the model 'nobody/nothing': ", done.stderr, re.MULTILINE), done.stderr


def test_a_name_that_is_not_text_is_no_error_after_the_edit(varedit, model_folder, photo, tmp_path):
    try:
        odd = tmp_path / os.fsdecode(b"caf\xe9.png")
        photo.rename(odd)
    except (OSError, UnicodeDecodeError):
        pytest.skip("file names are text here")
    ran = varedit("edit", odd, "blur", "--model", model_folder, *PIXELS_ALONE)
    assert ran.code == 0 and r"caf\udce9.edited.png" in ran.out, ran.err


def test_instruction_longer_than_the_model_takes(varedit, model_folder, photo, tmp_path):
    varedit("edit", photo, "word " * 300, "--model", model_folder).assert_refused("tokens")
    assert list(tmp_path.iterdir()) == [photo]


def test_missing_instruction(varedit, photo):
    varedit("edit", photo).assert_refused("instruction")


def test_unknown_command(varedit):
    varedit("paint").assert_refused("paint")


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ("no/such/folder/a.png", "create it first"), ("a.xyz", "'.xyz' is not supported"), ("a", "as in a.png"),
        (".", "is a folder"), ("photo.png", "exists already"),
    ],
)  # fmt: skip
def test_unwritable_output(output, named, varedit, model_folder, photo, tmp_path):
    before = photo.read_bytes()
    varedit("edit", photo, "blur", "--model", model_folder, "-o", tmp_path / output).assert_refused(named)
    assert list(tmp_path.iterdir()) == [photo] and photo.read_bytes() == before


# -- convert


@pytest.fixture
def released_files(parity_dir, tmp_path) -> list:
    """The recorded weights as the released files would hold them: options of `varedit convert`."""
    weights = load_file(parity_dir / "bsq32_f16.weights.safetensors")
    options = []
    for option, prefix in (("--transformer", "transformer."), ("--image-tokenizer", "vae.")):
        part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        path = tmp_path / f"{prefix}pth"
        torch.save(part, path)
        options += [option, path]
    return options


def test_convert_writes_a_folder_that_edit_reads(varedit, released_files, photo, tmp_path):
    from varedit.pipeline import VAREditPipeline

    output = tmp_path / "converted"
    ran = varedit("convert", *released_files, "-o", output, "--size=256", "--fit=native", "--position-layout=offset")
    assert ran.code == 0, ran.err
    assert "text encoder" in ran.err  # none was given: said so
    assert ran.out == f"{output}: written; it takes prompt_embeds\n"
    pipeline = VAREditPipeline.from_pretrained(output)
    assert (pipeline.config.size, pipeline.config.fit) == (256, "native")
    assert pipeline.transformer.config.position_layout == "offset"
    varedit("edit", photo, "blur", "--model", output).assert_refused("text encoder")


def test_convert_refuses_bad_input(varedit, released_files, tmp_path):
    output = tmp_path / "converted"
    varedit("convert", *released_files, "-o", output, "--preset=9b").assert_refused("9b")
    varedit("convert", *released_files, "-o", output, "--preset=2b-512").assert_refused()  # not its sizes
    varedit("convert", *released_files, "-o", output, "--size=100").assert_refused("100")
    swapped = [released_files[0], released_files[3], released_files[2], released_files[1]]
    varedit("convert", *swapped, "-o", output).assert_refused()
    assert not output.exists()


def test_convert_executes_no_pickle(varedit, released_files, tmp_path):
    evil, executed = tmp_path / "evil.pth", tmp_path / "executed"
    evil.write_bytes(pickle.dumps({"weight": Bomb(executed)}, protocol=2))
    ran = varedit("convert", "--transformer", evil, *released_files[2:], "-o", tmp_path / "converted")
    ran.assert_refused("evil.pth")
    assert not executed.exists() and not (tmp_path / "converted").exists()


def test_convert_names_a_missing_file(varedit, tmp_path):
    ran = varedit("convert", "--transformer=gone.pth", "--image-tokenizer=gone.pth", "-o", tmp_path / "converted")
    ran.assert_refused("gone.pth")


# -- data


def test_data_synth_writes_the_same_pairs_for_the_same_seed(varedit, tmp_path):
    from varedit.data.record import read_folder

    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        ran = varedit("data", "synth", "--count=2", "--size=128", f"--seed={seed}", "-o", tmp_path / name)
        assert ran.code == 0, ran.err
    assert "2 pairs" in ran.out
    records = list(read_folder(tmp_path / "a"))
    assert len(records) == 2 and all(record.instruction for record in records)
    pairs = {name: (tmp_path / name / "pairs.jsonl").read_bytes() for name in "abc"}
    assert pairs["a"] == pairs["b"] != pairs["c"]


def test_data_synth_uses_photographs(varedit, shared_dir, tmp_path):
    options = ["--objects", shared_dir / "data" / "objects", "--photos", shared_dir / "data" / "photos"]
    ran = varedit("data", "synth", "--count=3", "--size=128", "--split=test", *options, "-o", tmp_path / "pairs")
    assert ran.code == 0, ran.err
    assert len(list((tmp_path / "pairs" / "images").glob("*_source.png"))) == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [("--count", "0"), ("--size", "7"), ("--split", "dev"), ("--photos", "no/folder"), ("--objects", "no/folder")],
)
def test_data_synth_refuses_bad_input(option, value, varedit, tmp_path):
    varedit("data", "synth", "-o", tmp_path / "pairs", option, value).assert_refused(value)
    assert not (tmp_path / "pairs" / "pairs.jsonl").exists()


def test_data_synth_keeps_an_existing_folder(varedit, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("precious")
    varedit("data", "synth", "-o", tmp_path, "--count=1").assert_refused("pairs.jsonl")
    assert (tmp_path / "pairs.jsonl").read_text() == "precious"


# -- bad models


@pytest.fixture
def spoiled_folder(model_folder, tmp_path) -> Path:
    """A copy of the model folder to spoil."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    return folder


def weights_of(folder: Path) -> Path:
    return next((folder / "transformer").glob("*.safetensors"))


def test_missing_weight_is_refused_by_name(varedit, spoiled_folder, photo):
    weights = load_file(weights_of(spoiled_folder))
    del weights["head.weight"]
    save_file(weights, weights_of(spoiled_folder), {"format": "pt"})
    varedit("edit", photo, "blur", "--model", spoiled_folder).assert_refused("head.weight")
    assert not photo.with_name("photo.edited.png").exists()


def test_misshapen_weight_is_refused(varedit, spoiled_folder, photo):
    weights = load_file(weights_of(spoiled_folder))
    weights["head.weight"] = weights["head.weight"][:, :-1].contiguous()
    save_file(weights, weights_of(spoiled_folder), {"format": "pt"})
    varedit("edit", photo, "blur", "--model", spoiled_folder).assert_refused("head.weight")


def test_truncated_weights_are_refused(varedit, spoiled_folder, photo):
    path = weights_of(spoiled_folder)
    path.write_bytes(path.read_bytes()[:-1000])
    varedit("edit", photo, "blur", "--model", spoiled_folder).assert_refused()


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


def test_pickled_weights_are_refused_and_not_executed(varedit, spoiled_folder, photo, tmp_path):
    weights_of(spoiled_folder).unlink()
    evil = spoiled_folder / "transformer" / "diffusion_pytorch_model.bin"
    evil.write_bytes(pickle.dumps(Bomb(tmp_path / "executed"), protocol=2))
    varedit("edit", photo, "blur", "--model", spoiled_folder).assert_refused()
    assert not (tmp_path / "executed").exists()
