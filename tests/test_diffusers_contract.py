"""The seam to diffusers: every pitfall found there, held by a test. Everything offline, on tiny real components."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.pipelines import pipeline_loading_utils, pipeline_utils
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from varedit import VAREditImageTokenizer, VAREditPipeline, VAREditTransformer
from varedit.pipeline import VAREditOutput, load_pipeline
from varedit.testing import tiny_pipeline

COMPONENTS = ("transformer", "image_tokenizer", "text_encoder")
FLOAT32_PARTS = {"head", "head_modulation", "shared_modulation", "modulation_table", "log_scale"}
KEYS = {  # one weight of each component
    "transformer": "blocks.1.mlp.fc2.weight",
    "image_tokenizer": "decoder.conv_in.weight",
    "text_encoder": "encoder.block.1.layer.0.SelfAttention.q.weight",
}

PICTURE = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
PROMPT = "make it red"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved pipeline; copy it before changing anything."""
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected() -> VAREditOutput:
    return edit(tiny_pipeline())


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def edit(pipeline: VAREditPipeline) -> VAREditOutput:
    return pipeline(PICTURE, PROMPT, seed=1)


def same_edit(edited: VAREditOutput, expected: VAREditOutput) -> bool:
    return all(torch.equal(a, b) for a, b in zip(edited.bits[0], expected.bits[0], strict=True))


def weights_file(component: Path) -> Path:
    (file,) = component.glob("*.safetensors")
    return file


# -- save and load -------------------------------------------------------------------------------------------------


def test_save_and_load_keep_every_bit(folder: Path, expected: VAREditOutput):
    original, loaded = tiny_pipeline(), VAREditPipeline.from_pretrained(folder)
    for name in COMPONENTS:
        saved, read = (getattr(pipeline, name).state_dict() for pipeline in (original, loaded))
        assert saved.keys() == read.keys()
        for key, value in saved.items():
            assert value.dtype == read[key].dtype and torch.equal(value, read[key]), key
        assert not getattr(loaded, name).training
    edited = edit(loaded)
    assert same_edit(edited, expected)
    assert edited.images[0].tobytes() == expected.images[0].tobytes()


def test_pipeline_options_are_kept(tmp_path: Path):
    base = tiny_pipeline()
    options = {"size": 512, "fit": "square", "guidance_scale": 4.5, "temperature": 0.1, "top_p": 0.97}
    VAREditPipeline(base.transformer, base.image_tokenizer, **options).save_pretrained(tmp_path)
    loaded = VAREditPipeline.from_pretrained(tmp_path)
    assert {key: loaded.config[key] for key in options} == options
    assert loaded.text_encoder is None and loaded.tokenizer is None


def test_index_names_classes_by_the_package(folder: Path):
    """Not by the module that holds them, so that moving a file breaks no published checkpoint."""
    index = json.loads((folder / "model_index.json").read_text())
    del index["_diffusers_version"]
    assert index == {
        "_class_name": "VAREditPipeline",
        "fit": "native",
        "guidance_scale": 3.0,
        "image_tokenizer": ["varedit", "VAREditImageTokenizer"],
        "size": 128,
        "temperature": 0.5,
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "TokenizersBackend"],
        "top_p": 1.0,
        "transformer": ["varedit", "VAREditTransformer"],
    }


def test_saving_again_writes_the_same_files(folder: Path, tmp_path: Path):
    """Also that no setting changes on its way through JSON."""
    VAREditPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*"))
    for name in files:
        if name.name == "config.json":  # the path that it was loaded from is no setting
            first, second = (json.loads((root / name).read_text()) for root in (folder, tmp_path / "again"))
            first.pop("_name_or_path", None)
            second.pop("_name_or_path", None)
            assert first == second, name
        elif name.name not in ("model_index.json", "tokenizer_config.json"):  # transformers notes "is_local" there
            assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    first, second = (json.loads((root / "model_index.json").read_text()) for root in (folder, tmp_path / "again"))
    assert first == {key: value for key, value in second.items() if key != "_name_or_path"}


def test_components_load_alone(folder: Path):
    assert VAREditTransformer.from_pretrained(folder / "transformer").config.num_bits == 16
    assert VAREditImageTokenizer.from_pretrained(folder, subfolder="image_tokenizer").num_token_bits == 16
    model, info = VAREditTransformer.from_pretrained(folder / "transformer", output_loading_info=True)
    assert isinstance(model, VAREditTransformer) and not info["missing_keys"]


def test_sharded_save_and_load(tmp_path: Path, expected: VAREditOutput):
    tiny_pipeline().save_pretrained(tmp_path, max_shard_size="90KB")
    for name in COMPONENTS:
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
    assert same_edit(edit(VAREditPipeline.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_missing_shard_is_refused(tmp_path: Path, component):
    tiny_pipeline().save_pretrained(tmp_path, max_shard_size="90KB")
    shard = sorted((tmp_path / component).glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises((OSError, ValueError), match=shard.name):
        VAREditPipeline.from_pretrained(tmp_path)


def test_variant(tmp_path: Path, expected: VAREditOutput):
    tiny_pipeline().save_pretrained(tmp_path, variant="ema")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.ema.safetensors").exists()
    assert same_edit(edit(VAREditPipeline.from_pretrained(tmp_path, variant="ema")), expected)
    with pytest.raises(OSError, match="no file named"):
        VAREditPipeline.from_pretrained(tmp_path)


# -- from a hub repository -----------------------------------------------------------------------------------------

REPOSITORY = "someone/tiny-edit"


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch) -> Path:
    """Answers diffusers' questions to the hub with the saved folder's files; returns where they are downloaded to.

    Only the network functions are replaced: the check of the index against the repository's file list, the choice
    of files and the loading are diffusers' own.
    """
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files += ["transformer/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "README.md"]
    cache = tmp_path / "cache"

    def fetch(name: str) -> str:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(folder / name, cache / name))

    def fetch_all(repository: str, *, allow_patterns, ignore_patterns, **_) -> str:
        assert repository == REPOSITORY
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            fetch(name)  # a file that is only listed, the pickled weights, would fail here
        return str(cache)

    listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr(pipeline_utils, "model_info", lambda *_, **__: listing)
    monkeypatch.setattr(pipeline_utils, "hf_hub_download", lambda repository, name, **_: fetch(name))
    monkeypatch.setattr(pipeline_utils, "snapshot_download", fetch_all)
    return cache


def test_load_from_a_hub_repository(hub: Path, folder: Path, expected: VAREditOutput):
    assert same_edit(edit(VAREditPipeline.from_pretrained(REPOSITORY)), expected)
    fetched = {path.relative_to(hub) for path in hub.rglob("*") if path.is_file()}
    assert fetched == {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_the_hub_check_is_what_the_registration_passes(hub: Path, monkeypatch):
    monkeypatch.delitem(pipeline_loading_utils.LOADABLE_CLASSES, "varedit")
    with pytest.raises(ValueError, match=r"varedit\.py as defined in `model_index.json` does not exist"):
        VAREditPipeline.from_pretrained(REPOSITORY)


def test_an_incomplete_text_encoder_from_the_hub_is_refused(hub: Path, folder: Path, monkeypatch):
    key = KEYS["text_encoder"]
    fetch_all = pipeline_utils.snapshot_download

    def fetch_and_damage(*arguments, **options) -> str:
        cache = fetch_all(*arguments, **options)
        change_weights(Path(cache) / "text_encoder", lambda weights: weights.pop(key))
        return cache

    monkeypatch.setattr(pipeline_utils, "snapshot_download", fetch_and_damage)
    with pytest.raises(ValueError, match=key):
        VAREditPipeline.from_pretrained(REPOSITORY)


# -- incomplete and tampered checkpoints ---------------------------------------------------------------------------


def change_weights(component: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = weights_file(component)
    weights = {key: value.clone() for key, value in load_file(file).items()}
    change(weights)
    file.unlink()  # never written through: a loaded model may map the old file
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_missing_weight_is_refused_by_name(copied: Path, component):
    change_weights(copied / component, lambda weights: weights.pop(KEYS[component]))
    with pytest.raises(ValueError, match=KEYS[component]):
        VAREditPipeline.from_pretrained(copied)


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_extra_weight_is_refused_by_name(copied: Path, component):
    change_weights(copied / component, lambda weights: weights.update({"other.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"other\.weight"):
        VAREditPipeline.from_pretrained(copied)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_misshapen_weight_is_refused_by_name(copied: Path, component):
    change_weights(copied / component, lambda weights: weights.update({KEYS[component]: torch.zeros(3, 7)}))
    with pytest.raises(ValueError, match=KEYS[component]):
        VAREditPipeline.from_pretrained(copied)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_truncated_file_is_refused(copied: Path, component):
    file = weights_file(copied / component)
    contents = file.read_bytes()
    file.write_bytes(contents[: len(contents) // 2])
    with pytest.raises(ValueError, match=r"\w"):
        load_pipeline(copied, device="cpu")


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin"])
def test_pickled_weights_are_never_read(copied: Path, tmp_path: Path, component, name):
    weights_file(copied / component).unlink()
    (copied / component / name).write_bytes(pickle.dumps({"weight": Bomb(tmp_path / "exploded")}))
    with pytest.raises(OSError, match="safetensors"):
        VAREditPipeline.from_pretrained(copied)
    with pytest.raises(ValueError, match="safetensors"):
        load_pipeline(copied, device="cpu")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "entry, message",
    [
        (["os", "system"], "cannot be loaded"),
        (["nonsense_library", "VAREditTransformer"], "not one of the libraries"),
        (["varedit", "Nonsense"], "Nonsense"),
        (["custom", "Model"], "contains custom code"),
        ([None, None], "transformer"),
    ],
)
def test_an_index_that_names_something_else_is_refused(copied: Path, tmp_path: Path, entry, message):
    index = json.loads((copied / "model_index.json").read_text()) | {"transformer": entry}
    (copied / "model_index.json").write_text(json.dumps(index))
    code = f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\n"
    (copied / "transformer" / "custom.py").write_text(code)
    with pytest.raises(ValueError, match=message):
        load_pipeline(copied, device="cpu")
    assert not (tmp_path / "executed").exists()


# -- dtype ---------------------------------------------------------------------------------------------------------


def float32_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}


def test_bfloat16_keeps_the_float32_parts(folder: Path):
    pipeline = VAREditPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    names = dict(pipeline.transformer.named_parameters())
    wanted = {name for name in names if FLOAT32_PARTS.intersection(name.split("."))}
    assert float32_names(pipeline.transformer) == wanted and len(wanted) == 10
    exact = load_file(weights_file(folder / "transformer"))
    for name, parameter in names.items():
        assert torch.equal(parameter, exact[name] if name in wanted else exact[name].bfloat16()), name
    for component in (pipeline.image_tokenizer, pipeline.text_encoder):
        assert {parameter.dtype for parameter in component.parameters()} == {torch.bfloat16}


def test_a_whole_edit_in_bfloat16(folder: Path, expected: VAREditOutput):
    pipeline = VAREditPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    dtypes: list[torch.dtype] = []
    pipeline.transformer.register_forward_hook(
        lambda module, arguments, output: dtypes.append(output.dtype) if isinstance(output, Tensor) else None
    )
    edited = edit(pipeline)
    assert dtypes == [torch.float32] * 5  # logits of every scale
    assert edited.images[0].size == (140, 90)
    assert same_edit(edit(pipeline), edited)
    first = edited.bits[0][0] == expected.bits[0][0]  # later scales follow other bits once one differs
    assert first.float().mean() > 0.8


def test_casting_a_pipeline_equals_loading_it_so(folder: Path):
    loaded = VAREditPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    cast = VAREditPipeline.from_pretrained(folder).to(torch.bfloat16)
    for component in COMPONENTS:
        wanted = getattr(loaded, component).state_dict()
        for key, value in getattr(cast, component).state_dict().items():
            assert value.dtype == wanted[key].dtype and torch.equal(value, wanted[key]), key
    assert same_edit(edit(cast), edit(loaded))


# -- offload -------------------------------------------------------------------------------------------------------


def test_model_offload_changes_nothing(expected: VAREditOutput):
    pipeline = tiny_pipeline()
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert same_edit(edit(pipeline), expected)


def test_sequential_offload_changes_nothing(expected: VAREditOutput):
    """Every weight is on the meta device except while its own module runs.

    The calls are those of `enable_sequential_cpu_offload`, which itself asks for an accelerator ("cpu:0" fails in it).
    """
    pipeline = tiny_pipeline()
    for component in COMPONENTS:
        model = getattr(pipeline, component)
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
        assert all(parameter.is_meta for parameter in model.parameters())
    for _ in range(2):
        assert same_edit(edit(pipeline), expected)


def test_offload_that_cannot_work_is_refused():
    """Group offload and `device_map="auto"` hook the forward of parts that we call by other names."""
    transformer = tiny_pipeline().transformer
    with pytest.raises(ValueError, match="group offloading"):
        transformer.enable_group_offload(torch.device("cpu"))
    with pytest.raises(ValueError, match="device_map"):
        transformer._get_no_split_modules("auto")


# -- LoRA ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted() -> VAREditPipeline:
    """A pipeline whose transformer has an adapter that does something."""
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    pipeline.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_qkv"], init_lora_weights=False))
    return pipeline


def test_lora_switches_on_and_off(adapted: VAREditPipeline, expected: VAREditOutput):
    assert not same_edit(edit(adapted), expected)
    adapted.transformer.disable_adapters()
    assert same_edit(edit(adapted), expected)
    adapted.transformer.enable_adapters()
    assert not same_edit(edit(adapted), expected)
    adapted.transformer.delete_adapters("default")
    assert same_edit(edit(adapted), expected)


def test_a_new_lora_changes_nothing_and_trains_alone(expected: VAREditOutput):
    pipeline = tiny_pipeline()
    pipeline.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_qkv"]))
    assert same_edit(edit(pipeline), expected)
    trained = [name for name, parameter in pipeline.transformer.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all("lora_" in name for name in trained)


def test_lora_save_and_load(adapted: VAREditPipeline, tmp_path: Path):
    adapted.transformer.save_lora_adapter(tmp_path, weight_name="adapter.safetensors")
    pipeline = tiny_pipeline()
    options = {"weight_name": "adapter.safetensors", "use_safetensors": True}
    pipeline.transformer.load_lora_adapter(tmp_path, prefix=None, adapter_name="default", **options)
    own, read = adapted.transformer.state_dict(), pipeline.transformer.state_dict()
    assert sum("lora_" in key for key in own) == 4
    assert own.keys() == read.keys() and all(torch.equal(own[key], read[key]) for key in own)
    assert same_edit(edit(pipeline), edit(adapted))
