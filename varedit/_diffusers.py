"""The seam to diffusers: our model base class, and its registration with diffusers' pipeline loader.

Without the registration diffusers writes dotted module paths into `model_index.json` and refuses to load them from a
hub repository. With it, a component is stored as ["varedit", "VAREditTransformer"], resolved through the package's
public names.
"""

from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines import pipeline_loading_utils


class VAREditModel(ModelMixin):
    """diffusers' `ModelMixin` that refuses incomplete checkpoints.

    diffusers loads a missing weight as an empty tensor with only a warning, and the model then computes from
    uninitialised memory.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers; raises ValueError naming the keys that are missing, extra or of another shape."""
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except RuntimeError as error:
            raise ValueError(f"{pretrained_model_name_or_path} does not fit {cls.__name__}: {error}") from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(problem):
                keys = ", ".join(str(key) for key in list(info[problem])[:5])
                raise ValueError(
                    f"{pretrained_model_name_or_path} is not a complete {cls.__name__} checkpoint, "
                    f"{len(info[problem])} {problem.replace('_', ' ')}: {keys}; fetch or convert it again"
                )
        return (model, info) if wants_info else model


def register() -> None:
    """Tell diffusers' loader how to save and load our components. Safe to call more than once."""
    methods = {"VAREditModel": ["save_pretrained", "from_pretrained"]}
    pipeline_loading_utils.LOADABLE_CLASSES["varedit"] = methods
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(methods)


register()
