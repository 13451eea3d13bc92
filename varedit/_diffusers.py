"""The seam to diffusers: our model base class, and its registration with diffusers' pipeline loader.

Without the registration diffusers writes dotted module paths into `model_index.json` and refuses to load them from a
hub repository. With it, a component is stored as ["varedit", "VAREditTransformer"], resolved through the package's
public names.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import transformers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines import pipeline_loading_utils
from safetensors import SafetensorError


class VAREditModel(ModelMixin):
    """diffusers' `ModelMixin` that refuses incomplete checkpoints.

    diffusers loads a missing weight as an empty tensor with only a warning, and the model then computes from
    uninitialised memory.
    """

    _supports_group_offloading = False  # it hooks the forward of parts, and ours are called by other names

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers; raises ValueError naming the keys that are missing, extra or of another shape."""
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except RuntimeError as error:
            raise ValueError(f"{pretrained_model_name_or_path} does not fit {cls.__name__}: {error}") from error
        _refuse_problems(pretrained_model_name_or_path, cls.__name__, info)
        return (model, info) if wants_info else model

    def to(self, *args, **kwargs):
        """As in torch, but parts that must stay in float32 are moved only, as when loading in another dtype."""
        kept = {
            name: parameter.data
            for name, parameter in self.named_parameters()
            if set(self._keep_in_fp32_modules or ()).intersection(name.split("."))
        }
        super().to(*args, **kwargs)
        for name, parameter in self.named_parameters():
            if name in kept and parameter.dtype != kept[name].dtype:
                parameter.data = kept[name].to(parameter.device)
        return self


def check_text_encoder(folder: str | os.PathLike, index: Mapping, variant: str | None = None) -> None:
    """Raise ValueError, naming the keys, if the text encoder of a pipeline folder is incomplete.

    transformers fills a missing weight with random numbers and ignores an extra one, with only a warning. This reads
    no weights, only which there are.

    Args:
        index: the contents of `model_index.json`.
    """
    library, name = index.get("text_encoder") or (None, None)
    if library != "transformers" or name is None or not hasattr(transformers, name):
        return  # there is none, or the loader refuses it
    path = Path(folder) / "text_encoder"
    try:
        _, info = getattr(transformers, name).from_pretrained(
            path, variant=variant, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            device_map="meta",
        )  # fmt: skip
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); fetch or convert it again") from error
    _refuse_problems(path, name, info)


def _refuse_problems(path, class_name: str, info: Mapping) -> None:
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            keys = ", ".join(str(key) for key in list(info[problem])[:5])
            raise ValueError(
                f"{path} is not a complete {class_name} checkpoint, "
                f"{len(info[problem])} {problem.replace('_', ' ')}: {keys}; fetch or convert it again"
            )


def register() -> None:
    """Tell diffusers' loader how to save and load our components. Safe to call more than once."""
    methods = {"VAREditModel": ["save_pretrained", "from_pretrained"]}
    pipeline_loading_utils.LOADABLE_CLASSES["varedit"] = methods
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(methods)


register()
