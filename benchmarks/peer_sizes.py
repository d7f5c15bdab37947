"""The models of `benchmarks.peers`, in the words that both sides understand."""

import json
from typing import NamedTuple


class Sizes(NamedTuple):
  """A Mixtral with experts in every layer, and the batch it is trained on.

  Attributes:
    hidden_size: of the residual stream.
    num_layers: all with experts.
    num_heads: of queries; a head has hidden_size / num_heads dimensions.
    num_kv_heads: of keys and values.
    expert_width: of each expert.
    num_experts: of each layer.
    top_k: experts of a token.
    vocab_size: of embedding and head, which are not tied.
    batch_size: sequences.
    seq_len: tokens of each.
    balance_weight: of the balance loss over all layers together.
    clip_norm: of the gradient.
    learning_rate, weight_decay: of AdamW.
  """

  hidden_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  expert_width: int
  num_experts: int
  top_k: int
  vocab_size: int = 8192
  batch_size: int = 4
  seq_len: int = 512
  balance_weight: float = 0.01
  clip_norm: float = 1.0
  learning_rate: float = 1e-3
  weight_decay: float = 0.1

  def to_json(self) -> str:
    """For the command line of a worker."""
    return json.dumps(self._asdict())

  @classmethod
  def from_json(cls, text: str) -> 'Sizes':
    """What `to_json` wrote."""
    return cls(**json.loads(text))


MODELS = {
  'mixtral_18m': Sizes(256, 4, 4, 2, 512, 8, 2),
  'mixtral_52m': Sizes(384, 6, 6, 2, 768, 8, 2),
  'mixtral_18m_64_experts': Sizes(256, 4, 4, 2, 128, 64, 4),
}
