"""The whole model once more, from the papers' equations, in float64 numpy.

Token by token and expert by expert, without jax: an independent oracle for the
library. `params` is the library's tree of parameters.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moe_jax.config import layer_kinds

Array = np.ndarray


def logits(config: ConfigDict, params: Any, ids_BL: Array) -> Array:
  """[B, L, V] float64."""
  return np.stack([Sequence(config, params).run(ids_L) for ids_L in ids_BL])


class Sequence:
  """One sequence through the decoder.

  Attributes:
    routed: (probabilities_LN, chosen experts of each token) of every MoE
      sub-layer, in order.
  """

  def __init__(self, config: ConfigDict, params: Any) -> None:
    self.config = config
    self.params = params
    self.routed: list[tuple[Array, list[Array]]] = []

  def run(self, ids_L: Array) -> Array:
    params = self.params
    x_LD = f64(params['embed_VD'])[ids_L]
    self.h_LR = np.zeros((len(ids_L), self.config.router.state_size))
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
          x_LD = x_LD + swiglu(u_LD, sub_layer['feed_forward'])
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
    logits_LN = self.route(u_LD, layer['router'])
    y_LD, moe = np.zeros_like(u_LD), self.config.moe
    probabilities_LN, chosen = softmax(logits_LN), []
    for token, p_N in enumerate(probabilities_LN):
      best = np.argsort(-p_N, kind='stable')[: moe.top_k]
      weights = p_N[best]
      if moe.renormalize and moe.top_k > 1:
        weights = weights / weights.sum()
      for n, weight in zip(best, weights, strict=True):
        expert = {name: bank[n] for name, bank in layer['experts'].items()}
        y_LD[token] += weight * swiglu(
          u_LD[token],
          {
            'gate_up_D2F': expert['gate_up_ND2F'],
            'down_FD': expert['down_NFD'],
          },
        )
      chosen.append(best)
    self.routed.append((probabilities_LN, chosen))
    if 'bias_D' in layer:
      y_LD = y_LD + f64(layer['bias_D'])
    return self.mix(u_LD, y_LD, layer)

  def mix(self, u_LD: Array, routed_LD: Array, layer: Any) -> Array:
    shared = self.config.moe.shared
    if not shared.width:
      return routed_LD
    shared_LD = swiglu(u_LD, layer['shared'])
    if shared.mixing == 'sum':
      return routed_LD + shared_LD
    if shared.mixing == 'fixed':
      return shared.routed_weight * routed_LD + shared.shared_weight * shared_LD
    mixing = layer['mixing']
    c_L2 = softmax(u_LD @ f64(mixing['coefficient_D2']) + f64(mixing['bias_2']))
    return c_L2[:, :1] * routed_LD + c_L2[:, 1:] * shared_LD

  def route(self, u_LD: Array, router: Any) -> Array:
    weight_XN = f64(router['score']['weight_XN'])
    if self.config.router.recurrent == 'none':
      return u_LD @ weight_XN
    projected_LR = u_LD @ f64(
      router['features']['project']['projector_DR']
    )  # RMoE eq. 4
    cell = {name: f64(w) for name, w in self.params['cell'].items()}
    self.h_LR = np.stack(  # eq. 5: token by token, layer after layer
      [gru(u, h, cell) for u, h in zip(projected_LR, self.h_LR, strict=True)]
    )
    return self.h_LR @ weight_XN  # eq. 6


def gru(u_R: Array, h_R: Array, cell: dict[str, Array]) -> Array:
  """RMoE eq. 2-3 for one token, gate by gate."""

  def part(gate: int, side: str, x_R: Array) -> Array:
    weight = cell['input_X3R' if side == 'input' else 'hidden_R3R'][:, gate]
    return x_R @ weight + cell[f'{side}_bias_3R'][gate]

  r = sigmoid(part(0, 'input', u_R) + part(0, 'hidden', h_R))
  z = sigmoid(part(1, 'input', u_R) + part(1, 'hidden', h_R))
  n = np.tanh(part(2, 'input', u_R) + r * part(2, 'hidden', h_R))
  return (1 - z) * n + z * h_R


def swiglu(x: Array, weights: Any) -> Array:
  gate_up = np.tensordot(x, f64(weights['gate_up_D2F']), 1)
  gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
  return (gate * sigmoid(gate) * up) @ f64(weights['down_FD'])


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


def f64(array: Any) -> Array:
  return np.asarray(array, np.float64)


def sigmoid(x: Array) -> Array:
  return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)
