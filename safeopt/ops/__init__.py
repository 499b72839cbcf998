"""The ops `torch.ops.safeopt.*`: schemas, fakes, plain-torch kernels, and the compiled library.

Each op has a plain-torch kernel that runs anywhere. The compiled library, where it is built, takes
its place for CPU and CUDA tensors by registering with the dispatcher; nothing that calls an op
knows which kernel runs.
"""

from safeopt.ops.adamw import live_elements, live_indices, masked_adamw_
from safeopt.ops.directory import live_starts
from safeopt.ops.library import load
from safeopt.ops.scoring import esi_accumulate_, key_histogram_, select_bits_

load()

__all__ = [
    "esi_accumulate_",
    "key_histogram_",
    "live_elements",
    "live_indices",
    "live_starts",
    "masked_adamw_",
    "select_bits_",
]
