"""The whole model once more, from the papers' equations, in float64 numpy.

Token by token and expert by expert, without jax: an independent oracle for the
library. `params` is the library's tree of parameters.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moe_jax.config import layer_kinds
from tests.helpers.choosing import Selection, select
from tests.helpers.routing_oracles import Routers, f64, sigmoid, softmax

Array = np.ndarray


def logits(
  config: ConfigDict, params: Any, ids_BL: Array, disable_top: int = 0
) -> Array:
  """[B, L, V] float64; `disable_top` experts left out of every choice."""
  sequences = [
    Sequence(config, params, disable_top=disable_top) for _ in ids_BL
  ]
  return np.stack(
    [s.run(ids) for s, ids in zip(sequences, ids_BL, strict=True)]
  )


class Sequence:
  """One sequence through the decoder.

  Attributes:
    routed: (probabilities_LN, chosen experts of each token) of every MoE
      sub-layer, in order.
    routers: their states and logits.
  """

  def __init__(
    self,
    config: ConfigDict,
    params: Any,
    constants: Routers | None = None,
    disable_top: int | tuple[int, ...] = 0,
  ) -> None:
    """Stands before the first layer.

    Args:
      config: of the model.
      params: the library's tree.
      constants: what detached values are read from: see `Routers`.
      disable_top: every token's so many best experts are left out; a number
        for every router, or one for all.
    """
    self.config = config
    self.params = params
    self.disable_top = disable_top
    self.routed: list[tuple[Array, list[list[int]]]] = []
    self.routers = Routers(config.router, params.get('cell'), constants)

  def run(self, ids_L: Array) -> Array:
    params = self.params
    self.ids_L = ids_L
    x_LD = f64(params['embed_VD'])[ids_L]
    for kind, block in zip(
      layer_kinds(self.config), blocks(params), strict=True
    ):
      x_LD = x_LD + self.attention(self.norm(x_LD, block['norm']), block)
      chain = block['chain']
      for i in range(len(chain['sub_layers'])):
        sub_layer, norm = chain['sub_layers'][i], chain['norms'][i]
        u_LD = self.norm(x_LD, norm)
        if kind == 'moe':
          x_LD = x_LD + self.moe(u_LD, sub_layer)
        else:
          x_LD = x_LD + feed_forward(u_LD, sub_layer['feed_forward'])
    head_DV = params.get('head_DV')
    head_DV = f64(params['embed_VD']).T if head_DV is None else f64(head_DV)
    return self.norm(x_LD, params['norm']) @ head_DV

  def norm(self, x_LD: Array, norm: Any) -> Array:
    mean_square = (x_LD**2).mean(-1, keepdims=True)
    epsilon = self.config.model.norm_epsilon
    return x_LD / np.sqrt(mean_square + epsilon) * f64(norm['scale_D'])

  def attention(self, x_LD: Array, block: Any) -> Array:
    weights = {name: f64(w) for name, w in block['attention'].items()}
    q_LHA = self.rotate(np.einsum('LD,DHA->LHA', x_LD, weights['query_DHA']))
    k_LGA = self.rotate(np.einsum('LD,DGA->LGA', x_LD, weights['key_DGA']))
    v_LGA = np.einsum('LD,DGA->LGA', x_LD, weights['value_DGA'])
    out_LD = np.zeros_like(x_LD)
    heads, groups = q_LHA.shape[1], k_LGA.shape[1]
    for head in range(heads):
      group = head // (heads // groups)
      for i in range(len(x_LD)):
        scores = k_LGA[: i + 1, group] @ q_LHA[i, head]
        share = softmax(scores / np.sqrt(q_LHA.shape[-1]))
        out_LD[i] += share @ v_LGA[: i + 1, group] @ weights['out_HAD'][head]
    return out_LD

  def rotate(self, x_LHA: Array) -> Array:
    """Every pair (a, a + A/2) as a complex number, turned by its angle."""
    half = x_LHA.shape[-1] // 2
    theta = self.config.model.rope_theta
    pairs = x_LHA[..., :half] + 1j * x_LHA[..., half:]
    for position in range(len(x_LHA)):
      for a in range(half):
        angle = position * theta ** (-a / half)
        pairs[position, :, a] *= np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)

  def moe(self, u_LD: Array, layer: Any) -> Array:
    logits_LN = self.routers(u_LD, layer['router'], self.ids_L)
    bias_N = choice_bias(layer)
    disabled = self.disable_top
    if not isinstance(disabled, int):
      disabled = disabled[len(self.routed)]
    how = Selection.of(self.config, disabled)
    tokens = [select(logits_N, how, bias_N) for logits_N in logits_LN]
    y_LD = np.zeros_like(u_LD)
    for at, token in enumerate(tokens):
      for n, weight in zip(token.experts, token.weights, strict=True):
        expert = {name: leaf[n] for name, leaf in layer['experts'].items()}
        y_LD[at] += weight * feed_forward(u_LD[at], expert)
    probabilities_LN = np.stack([token.probabilities_N for token in tokens])
    self.routed.append((probabilities_LN, [token.experts for token in tokens]))
    if 'bias_D' in layer:
      y_LD = y_LD + f64(layer['bias_D'])
    return self.mix(u_LD, y_LD, layer)

  def mix(self, u_LD: Array, routed_LD: Array, layer: Any) -> Array:
    shared = self.config.moe.shared
    if not shared.width:
      return routed_LD
    # The mean of `parts` networks is the whole one's output over `parts`.
    shared_LD = feed_forward(u_LD, layer['shared']) / shared.parts
    if shared.mixing == 'sum':
      return routed_LD + shared_LD
    if shared.mixing == 'fixed':
      return shared.routed_weight * routed_LD + shared.shared_weight * shared_LD
    mixing = layer['mixing']
    c_L2 = softmax(u_LD @ f64(mixing['coefficient_D2']) + f64(mixing['bias_2']))
    return c_L2[:, :1] * routed_LD + c_L2[:, 1:] * shared_LD


def choice_bias(layer: Any) -> Array:
  """Of balancing without a loss; 0 where there is none."""
  return f64(layer.get('select', {}).get('choice_bias_N', 0.0))


def feed_forward(x: Array, weights: Any) -> Array:
  """One network, an expert or not: by the names of its weights."""
  part = {name.rpartition('_')[0]: f64(w) for name, w in weights.items()}
  if 'gate_up' in part:
    gate_up = np.tensordot(x, part['gate_up'], 1)
    gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
    return (gate * sigmoid(gate) * up) @ part['down']
  hidden = np.maximum(x @ part['up'] + part['up_bias'], 0)
  return hidden @ part['down'] + part['down_bias']


def blocks(params: Any) -> list[Any]:
  """Every layer's own parameters, from the first to the last."""
  found = list(ordered(params.get('prefix', {}).get('blocks', {})))
  periods = params.get('periods')
  if periods:
    stacked = list(ordered(periods['blocks']))
    count = len(stacked[0]['norm']['scale_D'])
    for p in range(count):
      found += [take(block, p) for block in stacked]
  return found


def ordered(children: Any) -> list[Any]:
  return [children[i] for i in sorted(children)]


def take(tree: Any, p: int) -> Any:
  if isinstance(tree, dict):
    return {name: take(child, p) for name, child in tree.items()}
  return tree[p]
