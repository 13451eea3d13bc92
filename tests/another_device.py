"""A device that no machine has, to see without a graphics card that nothing stays behind when a model moves to one.

A tensor on it holds an ordinary one. As on CUDA, operations refuse tensors of two devices and random numbers of another
one; they compute what the CPU computes, so that results can be compared. It can lack what MPS lacks. It knows nothing
of memory, streams, autocast, or speed.

`test_devices.py` runs this in a process of its own, since PyTorch registers a device once and for all:

    python tests/another_device.py edits offload scores training tokenizer gpu_recipe
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
CARRY = (aten._to_copy.default, aten.copy_.default)
"""Operations that bring values from one device to another."""
INDEX = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operations whose indices may lie on the CPU."""


class Module(_DummyBackendModule):
    """What PyTorch looks for as `torch.elsewhere`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def current_stream(self) -> "Module":
        return self

    def stream(self, _: object) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def synchronize(self) -> None: ...


_setup_privateuseone_for_python_backend("elsewhere", Module())
ELSEWHERE = torch.device("elsewhere:0")
_autocast = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_autocast.fallback(torch.library.fallthrough_kernel)  # autocast is allowed, and does nothing


class TensorElsewhere(Tensor):
    """Says that it is elsewhere; `held` is a tensor on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> Tensor:
        # Offload makes weights of the class of those before, which may have been on another device.
        if held.is_meta:
            return torch.nn.Parameter(held, requires_grad)
        held = held.held if isinstance(held, TensorElsewhere) else held
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, held.size(), device=ELSEWHERE, **layout)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    def tolist(self) -> list:
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def numpy(self, **_: object) -> np.ndarray:
        raise TypeError("a tensor elsewhere is no array; copy it to the CPU first")


class Generator(torch.Generator):
    """Random numbers as on the CPU; remembers the device that it was made for."""

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        generator = super().__new__(cls, "cpu")
        generator.there = torch.device(device)
        return generator

    @property
    def device(self) -> torch.device:
        return self.there


def is_elsewhere(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == ELSEWHERE.type


def compute(operation, args: tuple, kwargs: dict, like_mps: bool = False):
    """One operation of PyTorch: look where its tensors are, compute, and put the result where it belongs."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [isinstance(tensor, TensorElsewhere) for tensor in tensors]
    looked_at = tensors
    if operation in CARRY:
        looked_at = []
    elif operation in INDEX:
        looked_at = [leaf for leaf in (args[0], *args[2:3]) if isinstance(leaf, Tensor)]
        if any(there) and not isinstance(args[0], TensorElsewhere):
            raise RuntimeError(f"{operation}: a tensor on the CPU is indexed from elsewhere")
    # As everywhere in PyTorch, a number may be a tensor on the CPU.
    if any(there) and not all(isinstance(tensor, TensorElsewhere) or tensor.dim() == 0 for tensor in looked_at):
        places = ", ".join(f"{tuple(tensor.shape)} on {tensor.device.type}" for tensor in tensors)
        raise RuntimeError(f"{operation}: tensors of two devices: {places}")
    held_args, held_kwargs = tree_map(lambda x: x.held if isinstance(x, TensorElsewhere) else x, (args, kwargs))
    device = kwargs.get("device")
    if is_elsewhere(device):
        held_kwargs["device"] = torch.device("cpu")
    result = operation(*held_args, **held_kwargs)
    if operation is aten.copy_.default:
        return args[0]
    if not (is_elsewhere(device) if device is not None else any(there)):
        return result
    if like_mps:
        uneven = operation is aten._adaptive_avg_pool2d.default and any(
            n % m for n, m in zip(args[0].shape[2:], args[1])
        )
        shift = "shift" in str(operation)
        float64 = any(leaf.dtype == torch.float64 for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if uneven or shift or float64:
            raise TypeError(f"{operation}: this device cannot, or it would be wrong")
    wrapped = tree_map(lambda x: TensorElsewhere(x) if isinstance(x, Tensor) else x, result)
    return return_and_correct_aliasing(operation, args, kwargs, wrapped)


class Operations(TorchDispatchMode):
    def __init__(self, like_mps: bool) -> None:
        super().__init__()
        self.like_mps = like_mps

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {}, self.like_mps)


class Functions(TorchFunctionMode):
    """What does not come to `Operations`: tensors of Python values, whose a generator is, and masks of attention."""

    def __init__(self, like_mps: bool) -> None:
        super().__init__()
        self.like_mps = like_mps

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        generator, device = kwargs.get("generator"), kwargs.get("device")
        if generator is not None:
            tensors = [argument for argument in args if isinstance(argument, Tensor)]
            there = any(isinstance(tensor, TensorElsewhere) for tensor in tensors) or is_elsewhere(device)
            if is_elsewhere(generator.device) != there:
                raise RuntimeError(f"{function}: the generator is of another device")
        mask = kwargs.get("attn_mask") if function is F.scaled_dot_product_attention else None
        if self.like_mps and isinstance(mask, TensorElsewhere):
            if tuple(mask.shape) != (*args[0].shape[:3], args[1].shape[2]):
                raise TypeError("attention under a broadcast mask would be wrong on this device")
        if function in (torch.tensor, torch.as_tensor) and is_elsewhere(device):
            return function(*args, **(kwargs | {"device": None})).to(device)
        return function(*args, **kwargs)


@contextlib.contextmanager
def elsewhere(like_mps: bool = False) -> Iterator[torch.device]:
    """The device is there: `.to(device)`, `torch.zeros(..., device=device)`; see `runtime.computes_everything`."""
    usual, torch.Generator = torch.Generator, Generator
    try:
        with Functions(like_mps), Operations(like_mps):
            yield ELSEWHERE
    finally:
        torch.Generator = usual


# -- what is tried there -----------------------------------------------------------------------------------------------


def it_refuses_what_a_gpu_refuses() -> None:
    with elsewhere() as device:
        there, here = torch.ones(2, 3, device=device), torch.ones(2, 3)
        assert there.device == device and (there + 1).device == device and (there * torch.tensor(2)).device == device
        assert here.to(device)[here > 0].device == device and torch.equal(there.cpu(), here)
        for attempt in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: here[there > 0],
            lambda: torch.where(here > 0, there, there),
            lambda: torch.rand(3, generator=torch.Generator(), device=device),
            lambda: torch.nn.Linear(3, 2).to(device)(here),
            lambda: np.asarray(there),
        ):
            try:
                attempt()
            except (RuntimeError, TypeError):
                continue
            raise AssertionError("tensors of two devices were mixed")
    with elsewhere(like_mps=True) as device:
        ones = torch.ones(2, 2, 8, 8, device=device)
        for attempt in (
            lambda: ones.double(),
            lambda: F.adaptive_avg_pool2d(ones, 6),
            lambda: ones.long() >> 1,
            lambda: F.scaled_dot_product_attention(ones, ones, ones, attn_mask=ones[:, :1] > 0),
        ):
            try:
                attempt()
            except TypeError:
                continue
            raise AssertionError("MPS would have failed")
        F.adaptive_avg_pool2d(ones, 4)


def edits(folder: Path) -> None:
    """Edits of every kind: the very pixels that the CPU draws."""
    from varedit.editing.best_of import best_of
    from varedit.editing.edit import Settings, apply_edit
    from varedit.inspection import inspect_attention
    from varedit.testing import tiny_pipeline

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (height, 140, 3), np.uint8)) for height in (100, 140)]
    mask = Image.new("L", pictures[0].size)
    mask.paste(255, (20, 20, 70, 70))
    previews: list[Image.Image] = []

    def all_of(pipeline) -> list[np.ndarray]:
        first = pictures[0]
        images = pipeline(
            [*pictures, first], ["blur it", "make it red", "red"], seed=[1, 2, 3],
            callback_on_scale=lambda step: previews.extend(step.preview()) or None,
        ).images  # fmt: skip
        images += pipeline(first, "blur it", seed=1, guidance_scale=1, top_p=0.9).images
        for options in (
            {"mask": mask},
            {"mask": mask, "settings": Settings(lock="mask")},
            {"settings": Settings(lock="two-pass")},
        ):
            images.append(apply_edit(pipeline, first, "blur it", seed=3, **options).image)
        images += [candidate.result.image for candidate in best_of(pipeline, first, "blur it", 2, seed=4)]
        inspection = inspect_attention(pipeline, first, "blur it", seed=5)
        maps = [part.weights_lK.numpy() for block in inspection.maps for part in block]
        return [np.asarray(image) for image in (*images, inspection.result)] + maps

    pipeline = tiny_pipeline()
    expected = all_of(pipeline)
    with elsewhere(like_mps=True) as device:
        found = all_of(pipeline.to(device))
    for array, wanted in zip(found, expected, strict=True):
        assert np.allclose(array, wanted, rtol=0, atol=0 if array.dtype == np.uint8 else 1e-6)
    assert previews


def offload(folder: Path) -> None:
    """Weights in main memory, on the device for a call: what calls the parts of a model must bring them there."""
    from varedit.editing.best_of import best_of
    from varedit.editing.edit import apply_edit
    from varedit.inspection import inspect_attention
    from varedit.testing import tiny_pipeline

    picture = np.random.default_rng(0).integers(0, 256, (100, 140, 3), np.uint8)

    def all_of(pipeline) -> list[np.ndarray]:
        inspection = inspect_attention(pipeline, picture, "blur it", seed=5)
        images = [apply_edit(pipeline, picture, "blur it", seed=3).image, inspection.result]
        images += [candidate.result.image for candidate in best_of(pipeline, picture, "blur it", 2, seed=4)]
        return [np.asarray(image) for image in images] + [
            part.weights_lK.numpy() for block in inspection.maps for part in block
        ]

    expected = all_of(tiny_pipeline())
    for way in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        with elsewhere() as device:
            pipeline = tiny_pipeline()
            getattr(pipeline, way)(device=device)
            found = all_of(pipeline)
        for array, wanted in zip(found, expected, strict=True):
            assert np.allclose(array, wanted, rtol=0, atol=0 if array.dtype == np.uint8 else 1e-6), way


def scores(folder: Path) -> None:
    """Scores of networks, and stored features, as on the CPU but for the last digit."""
    from safetensors.torch import load
    from tiny_networks import tiny_clip, tiny_vit

    from varedit.data.features import FeatureEncoder
    from varedit.data.record import Record
    from varedit.evaluation.features import Clip, clip_direction, cosine, dino_embedding, structure_distance
    from varedit.testing import tiny_pipeline

    first, second = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), np.uint8)
    tiny_pipeline().save_pretrained(folder)

    def all_of(device: torch.device) -> list[float]:
        clip = tiny_clip()
        clip.model.set_attn_implementation("eager")  # how transformers attends on MPS is not our affair
        clip, vit = Clip(clip.model.to(device), clip.tokenizer), tiny_vit().to(device)
        images, texts = [clip.image(first), clip.image(second)], [clip.text("a cat"), clip.text("a dog")]
        looks = [dino_embedding(vit, picture) for picture in (first, second)]
        return [clip_direction(*images, *texts), cosine(*looks), structure_distance(vit, first, second)]

    def stored(device: torch.device) -> bytes:
        encoder = FeatureEncoder(str(folder), sizes=(128,), device=str(device))
        record = Record(first, second, ("blur it",))
        return encoder.encode(encoder.read(record), record.instructions)

    cpu = torch.device("cpu")
    with elsewhere(like_mps=True) as device:
        found, features = all_of(device), stored(device)
    assert np.allclose(found, all_of(cpu), rtol=1e-5)
    features, expected = load(features), load(stored(cpu))
    assert features.keys() == expected.keys()
    for name, values in features.items():
        torch.testing.assert_close(values, expected[name], rtol=2**-10, atol=1e-6)


def _losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("loss", "validation_loss") if key in row]


def _train(config, device: torch.device, run: Path) -> None:
    """Four steps in two parts, with validation, samples, an average, checkpoints and an export."""
    from varedit.training.config import EditorConfig
    from varedit.training.loop import Loop
    from varedit.training.processes import Processes
    from varedit.training.tokenizer_trainer import TokenizerTraining
    from varedit.training.trainer import EditorTraining

    processes = Processes(0, 1, device)
    kind = EditorTraining if isinstance(config, EditorConfig) else TokenizerTraining
    first = Loop(config, kind(config, processes, run), processes, run, resume=False)
    first.part_done = lambda: first.step / 2  # as if it were stopped there
    first.run()
    Loop(config, kind(config, processes, run), processes, run, resume=True).run()


def _compare(kind: type, values: dict, overrides: dict[str, list[str]], folder: Path) -> None:
    from varedit.training.config import load_config

    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    for name, changes in overrides.items():
        config = load_config(kind, path, changes)
        _train(config, torch.device("cpu"), folder / name / "here")
        with elsewhere() as device:
            _train(config, device, folder / name / "there")
        here, there = (_losses(folder / name / place) for place in ("here", "there"))
        # Off the CPU the text encoder computes in bfloat16.
        assert len(here) >= 4 and np.allclose(here, there, rtol=1e-3), (name, here, there)


COMMON = {
    "steps": 4, "batch_size": 4, "micro_batch_size": 2, "precision": "float32", "device": "cpu", "log_every": 1,
    "validate_every": 2, "sample_every": 4, "sample_count": 2, "save_every": 2, "ema_decay": 0.5,
    "optimizer": {"lr": 1e-3, "warm_up": 0},
}  # fmt: skip


def training(folder: Path) -> None:
    from varedit.data.record import Record, write_folder
    from varedit.testing import tiny_pipeline
    from varedit.training.config import EditorConfig

    tiny_pipeline().save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (height, 128, 3), np.uint8) for height in (128, 128, 96, 150)]
    write_folder((Record(picture, 255 - picture, ("invert it",)) for picture in pictures), folder / "pairs")
    data = {"source": str(folder / "pairs"), "sizes": {128: 1}, "num_workers": 0, "validation_count": 2}
    changes = {
        "pairs": ["gradient_checkpointing=true"],
        "adapters": ["lora.rank=4", "frozen_dtype=float32", "lora.dropout=0.1"],
        "world": ["data.source=world", "edit_weight=4", "optimizer.name=muon", "transformer.conditioning=full"],
    }
    _compare(EditorConfig, COMMON | {"start": str(folder / "model"), "data": data}, changes, folder)


def tokenizer(folder: Path) -> None:
    from varedit.training.config import TokenizerConfig

    parts = {"num_code_bits": 4, "base_width": 32, "multipliers": [1, 1], "num_blocks": 1, "stem_patch": 4}
    data = {"sizes": {128: 1}, "num_workers": 0, "validation_count": 2}
    more = ["entropy_weight=0.1", "adversarial_weight=0.1", "drop_scales=0.5"]
    values = COMMON | {"image_tokenizer": parts | {"patch_size": 2}, "data": data}
    _compare(TokenizerConfig, values, {"world": more}, folder)


def gpu_recipe(folder: Path) -> None:
    """The recipe for a GPU, its smallest preset. Its checkpoints are left out: such tensors cannot be pickled."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
    import small_gpu

    small_gpu.Chunk.save = lambda self: None
    with elsewhere() as device:
        small_gpu.device_of = lambda: device
        small_gpu.tokenizer(folder, preset="check", num_workers=0, minutes=60.0, steps=2)
    image_tokenizer = small_gpu.VAREditImageTokenizer(**small_gpu.PRESETS["check"].tokenizer)
    torch.save({"model": image_tokenizer.state_dict()}, folder / "tokenizer.pt")
    with elsewhere():
        small_gpu.editor(folder, preset="check", num_workers=0, minutes=60.0, steps=2)


TRIED: dict[str, Callable[[Path], None]] = {
    "edits": edits, "offload": offload, "scores": scores, "training": training, "tokenizer": tokenizer,
    "gpu_recipe": gpu_recipe,
}  # fmt: skip

if __name__ == "__main__":
    it_refuses_what_a_gpu_refuses()
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as temporary:
            TRIED[name](Path(temporary))
