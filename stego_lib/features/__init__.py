"""Frozen features: extracted once and kept on disk, or computed on demand."""

from .opening import open_features
from .store import Features

__all__ = ["Features", "open_features"]
