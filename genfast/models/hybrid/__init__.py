"""Hybrids: models made of two kinds of model."""

from genfast.models.hybrid.autoencoder import KLAutoencoder
from genfast.models.hybrid.clip import CLIP

__all__ = ["CLIP", "KLAutoencoder"]
