"""Hugging Face: model folders, and safeopt's optimizers in Trainer and in the trainers of TRL.

Importing this needs no extra; what is in it says when transformers is missing.
"""

from typing import TYPE_CHECKING, Any

from safeopt.integrations.transformers.folders import ORGANISM, load_model, located, save_model
from safeopt.integrations.transformers.optimizer import safe_optimizer
from safeopt.integrations.transformers.trainer import SafeOptTrainerMixin

if TYPE_CHECKING:
    from safeopt.integrations.transformers.callback import SafeOptCallback

__all__ = [
    "ORGANISM",
    "SafeOptCallback",
    "SafeOptTrainerMixin",
    "load_model",
    "located",
    "safe_optimizer",
    "save_model",
]


def __getattr__(name: str) -> Any:
    # Its base class is in transformers, which takes seconds to import and may not be there.
    if name != "SafeOptCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from safeopt.integrations.transformers.callback import SafeOptCallback
    except ImportError as error:
        raise ImportError(
            "SafeOptCallback needs transformers: pip install 'torch-safeopt[hf]'"
        ) from error
    return SafeOptCallback
