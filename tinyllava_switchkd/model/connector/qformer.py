"""Q-Former: BLIP-2's querying transformer (transformers' `Blip2QFormerModel`) as a connector."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerAttention

from tinyllava_switchkd.model.connector.base import Connector, register_connector

if TYPE_CHECKING:
    from tinyllava_switchkd.model.configuration import TinyLlavaConfig


class _BertNamed(Blip2QFormerAttention):
    """transformers' attention with its inner module named ``self``, as in BERT and v1's keys."""

    @property
    def attention(self) -> nn.Module:
        return self._modules["self"]


class _Bert(nn.Module):
    """v1's ``bert`` module: only the encoder, because v1 deletes the word embeddings and the norm's weights."""

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.encoder = Blip2QFormerModel(config).encoder
        for module in self.encoder.modules():
            if type(module) is Blip2QFormerAttention:
                module._modules["self"] = module._modules.pop("attention")
                module.__class__ = _BertNamed


class QFormer(nn.Module):
    """v1's Q-Former (``model/connector/qformer.py``): BERT base, cross-attention in every other layer.

    v1 reads the sizes from the hub's ``google-bert/bert-base-uncased``. Here they are transformers' defaults, which are
    the same, overridden by `qformer_config`. The weights are randomly initialised, as in v1.
    """

    def __init__(self, config: TinyLlavaConfig, num_queries: int) -> None:
        super().__init__()
        fields = {"encoder_hidden_size": config.vision_hidden_size, "cross_attention_frequency": 2}
        bert = Blip2QFormerConfig(**{**fields, **(config.qformer_config or {})})
        self.eps, self.dropout = bert.layer_norm_eps, bert.hidden_dropout_prob
        self.bert = _Bert(bert)
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, bert.hidden_size) * bert.initializer_range)
        self.projector = nn.Linear(bert.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[I, N, vision_hidden_size] -> [I, num_queries, hidden_size]."""
        queries = self.query_tokens.expand(len(x), -1, -1)  # [I, Q, W]
        hidden = F.layer_norm(queries, queries.shape[-1:], eps=self.eps)
        hidden = F.dropout(hidden, self.dropout, self.training)
        output = self.bert.encoder(hidden, encoder_hidden_states=x, query_length=queries.shape[1])
        return self.projector(output.last_hidden_state)


@register_connector("qformer")
class QFormerConnector(Connector):
    """Outputs `num_queries` tokens per image."""

    def __init__(self, config: TinyLlavaConfig) -> None:
        super().__init__(config)
        if not config.num_queries:
            raise ValueError("The connector 'qformer' needs num_queries in the configuration.")
        self._num_queries = config.num_queries
        self._connector = QFormer(config, config.num_queries)

    @classmethod
    def complete_config(cls, config: TinyLlavaConfig, tensors: dict[str, Tensor]) -> None:
        """v1's configuration lacks the Q-Former's sizes; its weights give them (heads are 64 wide, as in BERT)."""
        prefix = "connector._connector."
        queries = tensors.get(f"{prefix}query_tokens")
        intermediate = tensors.get(f"{prefix}bert.encoder.layer.0.intermediate_query.dense.weight")
        if config.qformer_config is not None or queries is None or intermediate is None:
            return
        layers = [re.match(rf"{re.escape(prefix)}bert\.encoder\.layer\.(\d+)\.", name) for name in tensors]
        width = queries.shape[-1]
        config.qformer_config = {
            "hidden_size": width,
            "intermediate_size": intermediate.shape[0],
            "num_hidden_layers": 1 + max(int(match[1]) for match in layers if match),
            "num_attention_heads": max(1, width // 64),
        }

    def num_tokens(self, num_vision_tokens: int) -> int:
        return self._num_queries
