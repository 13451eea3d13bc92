"""VAREdit: instruction-guided image editing by next-scale prediction.

Public names are resolved on first use, so that importing the package takes milliseconds (PyTorch and diffusers take
seconds).
"""

from importlib import import_module

TYPE_CHECKING = False  # not from typing: importing that takes longer than the rest of this file
if TYPE_CHECKING:
    from varedit.image_tokenizer import VAREditImageTokenizer
    from varedit.pipeline import VAREditPipeline
    from varedit.scales import ScaleSchedule, nearest_schedule, scale_schedule
    from varedit.transformer import VAREditTransformer

__version__ = "0.1.0"

__all__ = [
    "ScaleSchedule",
    "VAREditImageTokenizer",
    "VAREditPipeline",
    "VAREditTransformer",
    "__version__",
    "nearest_schedule",
    "scale_schedule",
]

_MODULE_OF = {
    "VAREditModel": "varedit._diffusers",  # diffusers' loader looks up the base class beside the components
    "ScaleSchedule": "varedit.scales",
    "VAREditImageTokenizer": "varedit.image_tokenizer",
    "VAREditPipeline": "varedit.pipeline",
    "VAREditTransformer": "varedit.transformer",
    "nearest_schedule": "varedit.scales",
    "scale_schedule": "varedit.scales",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
