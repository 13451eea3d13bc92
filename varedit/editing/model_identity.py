"""Which model: hashes of its weights and its configuration, whatever its folder is called."""

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from varedit.durable import write_durably
from varedit.pipeline import DEFAULT_MODEL, VAREditPipeline

logger = logging.getLogger(__name__)

_known: dict[str, str] = {}  # of this process, see `_file_sha256`

_CONFIG_NAMES = ("config.json", "tokenizer_config.json")  # of these a component's folder has one
_CONFIG_SUFFIXES = (".json", ".txt", ".model")
_IRRELEVANT = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "name_or_path", "is_local",
    "local_files_only", "padding", "truncation",
}  # fmt: skip
"""What libraries note in a configuration when they save, about themselves or the last call, besides `_names`."""


@dataclass(frozen=True)
class ModelIdentity:
    """A model by its weights and its configuration.

    Attributes:
        name: of the folder or of the hub repository; says nothing certain.
        kind: "files" for the safetensors files of a folder, "memory" for the weights of a pipeline that has none.
        sha256: over the weights.
        configs: hash of the configuration by component, see `folder_configs`. The pipeline's own defaults (guidance,
            temperature, ...) do not belong to it: a record of an edit has them in its settings.
    """

    name: str
    kind: str
    sha256: str
    configs: dict[str, str] = field(default_factory=dict)


def identify(pipeline: VAREditPipeline) -> ModelIdentity:
    """The identity of a pipeline: of the folder it was loaded from, else of what it holds.

    A pipeline with adapters or components from elsewhere is identified by what it holds. Weights changed in place
    after loading are not noticed: save such a pipeline and load it again.
    """
    name = pipeline.config.get("_name_or_path")
    modules = {part: module for part, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    adapted = any(
        getattr(module, "_hf_peft_config_loaded", False) or any("lora_" in key for key, _ in module.named_parameters())
        for module in modules.values()
    )
    if name and not adapted and (folder := model_folder(name)) and _come_from(folder, modules):
        return ModelIdentity(_short(name), "files", folder_sha256(folder), folder_configs(folder))
    return ModelIdentity(_short(name or "memory"), "memory", state_sha256(pipeline), state_configs(pipeline))


def _come_from(folder: Path, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether all parts of a pipeline were loaded from its folder: `from_pretrained` takes others in their place."""
    for part, module in modules.items():
        config: Any = module.config
        origin = config.get("_name_or_path") if isinstance(config, dict) else config.name_or_path
        if not origin or Path(origin).resolve() != (folder / part).resolve():
            return False
    return True


def identify_folder(model: str | os.PathLike | None) -> ModelIdentity | None:
    """The identity of a model that is not loaded; None is the packaged model. None where it is not on this disk."""
    name = str(DEFAULT_MODEL if model is None else model)
    folder = model_folder(name)
    return ModelIdentity(_short(name), "files", folder_sha256(folder), folder_configs(folder)) if folder else None


def model_defaults(model: str | os.PathLike | None) -> dict[str, Any]:
    """The pipeline's own defaults (guidance_scale, size, ...) of a model that is not loaded; {} if it is not here."""
    folder = model_folder(str(DEFAULT_MODEL if model is None else model))
    try:
        values = json.loads((folder / "model_index.json").read_bytes()) if folder else {}
    except (OSError, ValueError):  # loading the model will say so
        values = {}
    return values if isinstance(values, dict) else {}


def model_folder(name: str) -> Path | None:
    """The folder of a model named by folder or hub repository, if it is on this disk with weights in it."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError, OSError):
            return None
    return folder if any(folder.rglob("*.safetensors")) else None


def _short(name: str) -> str:
    """Folders are named by their last part: where they lie is nobody's business."""
    path = Path(name)
    if path.parent.name == "snapshots":  # of the hub's cache: models--owner--name/snapshots/revision
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name if path.is_dir() or path.is_absolute() else name


def folder_sha256(folder: Path) -> str:
    """Hash over the names and contents of the safetensors files of a model folder.

    Each file is hashed once and remembered by path, modification time and size, also for later processes.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(f"{path.relative_to(folder).as_posix()} {_file_sha256(path)}\n".encode())
    return digest.hexdigest()


def state_sha256(pipeline: VAREditPipeline) -> str:
    """Hash over the names, types, shapes and values of all weights of a pipeline."""
    digest = hashlib.sha256()
    for name, module in sorted(pipeline.components.items()):
        if isinstance(module, torch.nn.Module):
            for key, value in sorted(module.state_dict().items()):
                if value.is_meta:
                    raise ValueError(
                        f"the weights of the {name} are offloaded one by one and cannot be identified; load the model "
                        "from a folder without adapters, or use enable_model_cpu_offload"
                    )
                digest.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def folder_configs(folder: Path) -> dict[str, str]:
    """Of each component of a model folder a hash over its configuration: the small files beside the weights.

    Saving the same model again does not change it, see `_IRRELEVANT`.
    """
    hashes = {}
    for part in sorted(path for path in folder.iterdir() if any((path / name).is_file() for name in _CONFIG_NAMES)):
        files = [path for path in sorted(part.iterdir()) if path.suffix in _CONFIG_SUFFIXES]
        lines = [f"{path.name} {_config_sha256(path)}\n" for path in files if not path.name.endswith(".index.json")]
        hashes[part.name] = hashlib.sha256("".join(lines).encode()).hexdigest()
    return hashes


def _config_sha256(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".json":
        try:
            values = json.loads(data)
        except ValueError:  # loading the model will say so
            values = None
        if isinstance(values, dict):
            kept = {key: value for key, value in values.items() if not key.startswith("_") and key not in _IRRELEVANT}
            data = json.dumps(kept, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def state_configs(pipeline: VAREditPipeline) -> dict[str, str]:
    """`folder_configs` of a pipeline as it would be saved, and a hash over how strongly its adapters act."""
    with tempfile.TemporaryDirectory() as name:
        for part, component in pipeline.components.items():
            if hasattr(component, "save_config"):  # of diffusers
                component.save_config(Path(name, part))
            elif component is not None:  # of transformers: a model or a tokenizer
                getattr(component, "config", component).save_pretrained(Path(name, part))
        hashes = folder_configs(Path(name))
    if strengths := _adapter_strengths(pipeline):
        hashes["adapters"] = hashlib.sha256(json.dumps(strengths, sort_keys=True).encode()).hexdigest()
    return hashes


def _adapter_strengths(pipeline: VAREditPipeline) -> dict[str, dict[str, float]]:
    """The factors of the active adapters in every adapted layer; their weights are told by `state_sha256`."""
    strengths = {}
    for part, component in pipeline.components.items():
        for key, layer in component.named_modules() if isinstance(component, torch.nn.Module) else ():
            if hasattr(layer, "lora_A"):
                active = [] if layer.disable_adapters else layer.active_adapters
                strengths[f"{part}.{key}"] = {name: layer.scaling[name] for name in active if name in layer.scaling}
    return strengths


def _file_sha256(path: Path) -> str:
    status = path.stat()
    key = f"{path.resolve()} {status.st_mtime_ns} {status.st_size}"
    if key not in _known:
        _known.update(_load_cache())
    if key not in _known:
        with open(path, "rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        _save_cache()
    return _known[key]


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "varedit" / "weights.json"


def _load_cache() -> dict[str, str]:
    try:
        cached = json.loads(_cache_file().read_text())
    except (OSError, ValueError):  # no cache yet, or an unreadable one: the files are hashed again
        return {}
    return {str(key): str(value) for key, value in cached.items()} if isinstance(cached, dict) else {}


def _save_cache() -> None:
    try:
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_durably(_cache_file(), json.dumps(_load_cache() | _known, indent=1).encode())
    except OSError as error:  # a home that cannot be written to costs time, nothing else
        logger.debug("the hashes of weights are not kept: %s", error)
