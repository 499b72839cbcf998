"""Keeps a language model safe while people fine-tune it: score, select, protect, evaluate."""

from importlib.util import find_spec as _find_spec

if _find_spec("safeopt.gp_opt") is not None:
    raise ImportError(
        "the unrelated package 'safeopt' (Bayesian optimization) is installed over torch-safeopt:"
        " both own the folder safeopt/. Run `pip uninstall safeopt torch-safeopt`, then"
        " `pip install torch-safeopt`."
    )

import safeopt.evaluate as evaluate
import safeopt.methods as methods
import safeopt.parametrize as parametrize
from safeopt._version import __version__
from safeopt.direction import AlignmentDirection
from safeopt.input_space import InputSpace
from safeopt.mask import BitMask, SafetyMask
from safeopt.optim import AsFTAdamW, SafeAdamW, hold, project_step
from safeopt.penalty import asft_penalty
from safeopt.scores import Scores, score
from safeopt.selection import select

__all__ = [
    "AlignmentDirection",
    "AsFTAdamW",
    "BitMask",
    "InputSpace",
    "SafeAdamW",
    "SafetyMask",
    "Scores",
    "__version__",
    "asft_penalty",
    "evaluate",
    "hold",
    "methods",
    "parametrize",
    "project_step",
    "score",
    "select",
]
