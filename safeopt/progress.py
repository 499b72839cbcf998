"""A bar on stderr for what lasts, where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def bar(items: Iterable[T], progress: bool, title: str, unit: str) -> Iterable[T]:
    """The items, with a bar that counts them if that is wanted and tqdm is installed."""
    if not progress:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=title, unit=unit)
