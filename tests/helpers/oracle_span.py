"""The backbone of the enwik8 and WikiText-103 settings, in float64 numpy.

Post-norm blocks or pre-norm, attention to the span before a token, a memory of
hidden states; feed-forwards and routers are those of `oracle.Sequence`.
"""

from typing import Any

import numpy as np

from moe_jax.config import layer_kinds
from tests.helpers import oracle
from tests.helpers.oracle import Array, f64, softmax
from tests.helpers.routing_oracles import Routers


class Sequence(oracle.Sequence):
  """One sequence, with the memory of what came before it.

  Attributes:
    memory: of every layer, the hidden states that it read last, [W, D].
  """

  def run(self, ids_L: Array, memory: list[Array] | None = None) -> Array:
    model = self.config.model
    zeros = np.zeros((model.span, model.hidden_size))
    before = [zeros] * model.num_layers if memory is None else memory
    self.memory = []
    self.ids_L = ids_L
    self.routers = Routers(self.config.router, self.params.get('cell'))
    x_LD = f64(self.params['embed_VD'])[ids_L]
    for kind, block, past in zip(
      layer_kinds(self.config), oracle.blocks(self.params), before, strict=True
    ):
      self.memory.append(np.concatenate([past, x_LD])[-model.span :])
      layer = {'pre': self.pre, 'post': self.post}[model.norm_place]
      x_LD = layer(x_LD, past, block, kind)
    if model.norm_place == 'pre':
      x_LD = self.norm(x_LD, self.params['norm'])
    logits_LV = x_LD @ f64(self.params['head_DV'])
    return logits_LV + f64(self.params.get('head_bias_V', 0))

  def post(self, x_LD: Array, past_WD: Array, block: Any, kind: str) -> Array:
    seen_LD = self.see(x_LD, past_WD, block['attention'])
    x_LD = self.norm(x_LD + seen_LD, block['norm'])
    y_LD, chain = x_LD, block['chain']
    for i in range(len(chain['sub_layers'])):
      out_LD = self.sub_layer(y_LD, chain['sub_layers'][i], kind)
      y_LD = self.norm(y_LD + out_LD, chain['norms'][i])
    return self.norm(x_LD + y_LD, block['outer_norm'])

  def pre(self, x_LD: Array, past_WD: Array, block: Any, kind: str) -> Array:
    norm, chain = block['norm'], block['chain']
    x_LD = x_LD + self.see(
      self.norm(x_LD, norm), self.norm(past_WD, norm), block['attention']
    )
    for i in range(len(chain['sub_layers'])):
      u_LD = self.norm(x_LD, chain['norms'][i])
      x_LD = x_LD + self.sub_layer(u_LD, chain['sub_layers'][i], kind)
    return x_LD

  def sub_layer(self, u_LD: Array, layer: Any, kind: str) -> Array:
    if kind == 'moe':
      return self.moe(u_LD, layer)
    return oracle.feed_forward(u_LD, layer['feed_forward'])

  def norm(self, x_LD: Array, norm: Any) -> Array:
    if self.config.model.norm == 'rms':
      return super().norm(x_LD, norm)
    return np.stack(
      [
        (x_D - x_D.mean())
        / np.sqrt(x_D.var() + self.config.model.norm_epsilon)
        * f64(norm['scale_D'])
        + f64(norm['shift_D'])
        for x_D in x_LD
      ]
    )

  def see(self, x_LD: Array, past_WD: Array, attention: Any) -> Array:
    """Position by position: i attends to the span before it, not to itself."""
    weights = {name: f64(w) for name, w in attention.items()}
    key_pe_AW = f64(self.params['key_pe_AW'])
    head_dim, span = key_pe_AW.shape
    context = np.concatenate([past_WD, x_LD])
    heads, groups = (weights[n].shape[1] for n in ('query_DHA', 'key_DGA'))
    out_LD = np.zeros_like(x_LD)
    for head in range(heads):
      group = head // (heads // groups)
      for i in range(len(x_LD)):
        q_A = x_LD[i] @ weights['query_DHA'][:, head]
        logits = np.zeros(span)
        values = np.zeros((span, head_dim))
        for j in range(span):
          seen_D = context[i + j]  # position i - span + j
          key_A = seen_D @ weights['key_DGA'][:, group]
          values[j] = seen_D @ weights['value_DGA'][:, group]
          logits[j] = (q_A @ key_A + q_A @ key_pe_AW[:, j]) / head_dim**0.5
        out_LD[i] += softmax(logits) @ values @ weights['out_HAD'][head]
    return out_LD
