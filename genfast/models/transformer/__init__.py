"""Transformers on the fused attention: decoder, encoder, encoder-decoder, images."""

from genfast.models.transformer.decoder import GPT
from genfast.models.transformer.encoder import BERT
from genfast.models.transformer.seq2seq import T5
from genfast.models.transformer.vit import ViT
from genfast.models.transformer.weights import from_transformers

__all__ = ["BERT", "GPT", "T5", "ViT", "from_transformers"]
