"""Quantized modules, as users name them.

``QuantLinear`` and ``QuantEmbedding`` stand where ``nn.Linear`` and ``nn.Embedding`` stood; a ``TiedQuantLinear`` is
what :meth:`QuantEmbedding.shared_head` makes.
"""

from __future__ import annotations

from .embedding import QuantEmbedding, TiedQuantLinear
from .linear import QuantLinear

__all__ = ["QuantEmbedding", "QuantLinear", "TiedQuantLinear"]
