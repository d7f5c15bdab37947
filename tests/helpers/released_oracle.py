"""What the released code computes, on its own names, in float64 numpy.

Written from the behaviour of llama_moe_rnn/llama_moe_modeling.py and rnn.py of
qiuzh20/RMoE, and of transformers/models/llama/modeling_llama.py of
suu990901/CartesianMoE; it knows nothing of this library. `released` makes
random tensors of the names and shapes that their modules have.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray
Tensors = dict[str, Array]
Keys = dict[str, Any]


class Model:
  """One checkpoint: `Model(config, tensors).logits(ids)`."""

  def __init__(self, keys: Keys, tensors: Tensors):
    self.keys = keys
    self.tensors = tensors

  def logits(self, ids_BL: Array) -> Array:
    return np.stack([self.sequence(ids_L) for ids_L in ids_BL])

  def sequence(self, ids_L: Array) -> Array:
    # Of the recurrent router, layer after layer.
    self.state: Array | None = None
    self.ids = ids_L
    x = self['model.embed_tokens'][ids_L]
    for layer in range(self.keys['num_hidden_layers']):
      at = f'model.layers.{layer}.'
      x = x + self.attention(at, self.norm(f'{at}input_layernorm', x))
      x = self.feed_forward(at, x)
    x = self.norm('model.norm', x)
    tied = self.keys.get('tie_word_embeddings')
    return x @ self['model.embed_tokens' if tied else 'lm_head'].T

  def feed_forward(self, at: str, x: Array) -> Array:
    raise NotImplementedError

  def __getitem__(self, name: str) -> Array:
    return self.tensors[f'{name}.weight'].astype(np.float64)

  def norm(self, name: str, x: Array) -> Array:
    epsilon = self.keys.get('rms_norm_eps', 1e-6)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * self[name]

  def attention(self, at: str, x: Array) -> Array:
    heads = self.keys['num_attention_heads']
    size = x.shape[-1] // heads
    theta = self.keys.get('rope_theta', 10_000.0)

    def project(name: str) -> Array:
      return (x @ self[f'{at}self_attn.{name}'].T).reshape(len(x), -1, size)

    def rotated(y: Array) -> Array:
      frequency = 1.0 / theta ** (np.arange(0, size, 2) / size)
      angle = np.outer(np.arange(len(y)), frequency)
      angle = np.concatenate([angle, angle], -1)[:, None]
      half = np.concatenate([-y[..., size // 2 :], y[..., : size // 2]], -1)
      return y * np.cos(angle) + half * np.sin(angle)

    q, k, v = map(project, ('q_proj', 'k_proj', 'v_proj'))
    q, k = rotated(q), rotated(k)
    k, v = (np.repeat(y, heads // y.shape[1], 1) for y in (k, v))
    scores = np.einsum('qha,kha->hqk', q, k) / np.sqrt(size)
    hidden = np.triu(np.ones(scores.shape[1:], bool), 1)
    share = softmax(np.where(hidden, -np.inf, scores))
    mixed = np.einsum('hqk,kha->qha', share, v).reshape(len(x), -1)
    return mixed @ self[f'{at}self_attn.o_proj'].T

  def mlp(self, at: str, x: Array, names: str = 'gate_proj up_proj down_proj'):
    gate, up, down = (self[f'{at}.{name}'] for name in names.split())
    y = x @ gate.T
    return (y / (1 + np.exp(-y)) * (x @ up.T)) @ down.T


class RMoE(Model):
  """qiuzh20/RMoE."""

  def feed_forward(self, at: str, x: Array) -> Array:
    u = self.norm(f'{at}post_attention_layernorm', x)
    if f'{at}mlp.gate_proj.weight' in self.tensors:
      return x + self.mlp(f'{at}mlp', u)
    routed = self.moe(f'{at}block_sparse_moe.', u)
    if not self.keys['add_moe_share_expert']:
      return x + routed
    shared = self.mlp(f'{at}mlp_share', u) * self.keys['share_weight']
    return x + routed * self.keys['moe_weight'] + shared

  def moe(self, at: str, u: Array) -> Array:
    kind = self.keys['moe_router_type']
    if kind in ('gru', 'rnn'):
      x = u @ self.tensors[f'{at}weight1'].T
      h = np.zeros_like(x) if self.state is None else self.state
      self.state = {'gru': self.gru, 'rnn': self.rnn}[kind](x, h)
      scores = softmax(self.state @ self.tensors[f'{at}weight2'].T)
    else:
      scores = softmax(u @ self[f'{at}gate'].T)
    best = np.argsort(-scores, -1)[:, : self.keys['num_experts_per_tok']]
    y = np.zeros_like(u)
    for token, chosen in enumerate(best):
      for expert in chosen:
        weight = scores[token, expert] / scores[token, chosen].sum()
        at_expert = f'{at}experts.{expert}'
        y[token] += weight * self.mlp(at_expert, u[token], 'w1 w3 w2')
    if self.keys['add_moe_bias']:
      y = y + self.tensors[f'{at}bias']
    return y

  def part(self, side: str, gate: str, x: Array) -> Array:
    cell = 'model.rnn_router.'
    weight = self.tensors[f'{cell}weight_{side}{gate}']
    return x @ weight.T + self.tensors[f'{cell}bias_{side}{gate}']

  def gru(self, x: Array, h: Array) -> Array:
    r, z = (
      1 / (1 + np.exp(-self.part('i', gate, x) - self.part('h', gate, h)))
      for gate in 'rz'
    )
    n = np.tanh(self.part('i', 'n', x) + r * self.part('h', 'n', h))
    return (1 - z) * n + z * h

  def rnn(self, x: Array, h: Array) -> Array:
    return np.tanh(self.part('i', 'n', x) + self.part('h', 'n', h))


class CartesianMoE(Model):
  """suu990901/CartesianMoE."""

  def feed_forward(self, at: str, x: Array) -> Array:
    u = self.norm(f'{at}post_attention_layernorm', x)
    if f'{at}mlp.gate_proj.weight' in self.tensors:
      return x + self.mlp(f'{at}mlp', u)
    if not self.keys['c2_fine_grain']:
      return x + self.moe(at, u, '')
    x = x + self.moe(at, u, '0')
    return x + self.moe(at, self.norm(f'{at}mlp_layernorm', x), '1')

  def moe(self, at: str, u: Array, number: str) -> Array:
    top_k = self.keys['moe_top_k']
    logits = u @ self[f'{at}wg{number}'].T
    if top_k == -2:
      logits, top_k = self['model.router_tokens'][self.ids], 2
    routed = np.zeros_like(u)
    for token, p in enumerate(softmax(logits)):
      for expert, weight in top_p(p) if top_k <= 0 else best(p, top_k):
        one = self.mlp(f'{at}mlp{number}.{expert}', u[token])
        routed[token] += weight * one
    if not self.keys['use_residual']:
      return routed
    name = f'{at}coefficient{number}'
    c = softmax(u @ self[name].T + self.tensors[f'{name}.bias'])
    shared = self.shared(f'{at}res_mlp{number}', u)
    return routed * c[:, :1] + shared * c[:, 1:]

  def shared(self, at: str, u: Array) -> Array:
    if f'{at}.gate_proj.weight' in self.tensors:
      return self.mlp(at, u)
    return (self.mlp(f'{at}.mlp0', u) + self.mlp(f'{at}.mlp1', u)) * 0.5


def best(p: Array, k: int) -> Iterator[tuple[int, float]]:
  """Experts and weights; a lone one keeps its probability."""
  chosen = np.argsort(-p)[:k]
  total = p[chosen].sum() if k > 1 else 1.0
  return ((int(expert), p[expert] / total) for expert in chosen)


def top_p(p: Array) -> Iterator[tuple[int, float]]:
  """Until more than 0.4 is covered, that one included; not renormalised."""
  covered = 0.0
  for expert in np.argsort(-p):
    yield int(expert), p[expert]
    covered += p[expert]
    if covered > 0.4:
      return


def softmax(x: Array) -> Array:
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def tensors(keys: Keys, shapes: Callable[[Keys], dict]) -> Tensors:
  """Random float32 tensors; norms around 1."""
  random = np.random.default_rng(0)

  def tensor(name: str, shape: tuple[int, ...]) -> Array:
    center, scale = (1.0, 0.1) if 'norm' in name else (0.0, 0.3)
    return random.normal(center, scale, shape).astype(np.float32)

  return {name: tensor(name, shape) for name, shape in shapes(keys).items()}


def decoder_shapes(keys: Keys) -> dict[str, tuple[int, ...]]:
  """Of everything but the feed-forwards."""
  size, vocab = keys['hidden_size'], keys['vocab_size']
  heads = keys['num_attention_heads']
  keys_size = size // heads * keys.get('num_key_value_heads', heads)
  shapes = {
    'model.embed_tokens.weight': (vocab, size),
    'model.norm.weight': (size,),
  }
  if not keys.get('tie_word_embeddings'):
    shapes['lm_head.weight'] = vocab, size
  for layer in range(keys['num_hidden_layers']):
    at = f'model.layers.{layer}.'
    shapes |= {
      f'{at}input_layernorm.weight': (size,),
      f'{at}post_attention_layernorm.weight': (size,),
      f'{at}self_attn.q_proj.weight': (size, size),
      f'{at}self_attn.k_proj.weight': (keys_size, size),
      f'{at}self_attn.v_proj.weight': (keys_size, size),
      f'{at}self_attn.o_proj.weight': (size, size),
    }
  return shapes


def mlp_shapes(at: str, size: int, width: int, names: str = '') -> dict:
  gate, up, down = (names or 'gate_proj up_proj down_proj').split()
  return {
    f'{at}.{gate}.weight': (width, size),
    f'{at}.{up}.weight': (width, size),
    f'{at}.{down}.weight': (size, width),
  }


def rmoe_shapes(keys: Keys) -> dict[str, tuple[int, ...]]:
  shapes = decoder_shapes(keys)
  size, wide = keys['hidden_size'], keys['intermediate_size']
  experts, state = keys['num_local_experts'], keys['moe_router_rnn_hidden_size']
  kind = keys['moe_router_type']
  for gate in {'gru': 'rzn', 'rnn': 'n'}.get(kind, ''):
    for side in 'ih':
      shapes[f'model.rnn_router.weight_{side}{gate}'] = state, state
      shapes[f'model.rnn_router.bias_{side}{gate}'] = (state,)
  dense = keys['num_hidden_layers'] - keys['moe_num_layers']
  for layer in range(keys['num_hidden_layers']):
    at = f'model.layers.{layer}.'
    if layer < dense:
      shapes |= mlp_shapes(f'{at}mlp', size, wide)
      continue
    if keys['add_moe_share_expert']:
      width = keys['moe_share_expert_intermediate_size'] or wide
      shapes |= mlp_shapes(f'{at}mlp_share', size, width)
    at += 'block_sparse_moe.'
    if keys['add_moe_bias']:
      shapes[f'{at}bias'] = (size,)
    if kind in ('gru', 'rnn'):
      shapes[f'{at}weight1'] = state, size
      shapes[f'{at}weight2'] = experts, state
    else:
      shapes[f'{at}gate.weight'] = experts, size
    for expert in range(experts):
      width = keys['moe_expert_intermediate_size'] or wide
      shapes |= mlp_shapes(f'{at}experts.{expert}', size, width, 'w1 w3 w2')
  return shapes


def cartesian_shapes(keys: Keys) -> dict[str, tuple[int, ...]]:
  shapes = decoder_shapes(keys)
  size, wide = keys['hidden_size'], keys['intermediate_size']
  experts = keys['num_experts']
  if keys['moe_top_k'] == -2:
    shapes['model.router_tokens.weight'] = keys['vocab_size'], experts
  for layer in range(keys['num_hidden_layers']):
    at = f'model.layers.{layer}.'
    if not is_moe(keys, layer):
      shapes |= mlp_shapes(f'{at}mlp', size, wide)
      continue
    fine = keys['fine_grain'] or keys['c2_fine_grain']
    width = wide // keys['grain_level'] if fine else wide
    if keys['c2_fine_grain']:
      shapes[f'{at}mlp_layernorm.weight'] = (size,)
    for number in '01' if keys['c2_fine_grain'] else ('',):
      shapes[f'{at}wg{number}.weight'] = experts, size
      for expert in range(experts):
        shapes |= mlp_shapes(f'{at}mlp{number}.{expert}', size, width)
      if keys['use_residual']:
        shapes[f'{at}coefficient{number}.weight'] = 2, size
        shapes[f'{at}coefficient{number}.bias'] = (2,)
        double = keys['fine_grain'] and not keys['c2_fine_grain']
        for part in ('.mlp0', '.mlp1') if double else ('',):
          shapes |= mlp_shapes(f'{at}res_mlp{number}{part}', size, width)
  return shapes


def is_moe(keys: Keys, layer: int) -> bool:
  if not keys['use_moe'] or keys['num_experts'] == 1:
    return False
  if keys['initial_moe_layer'] >= 0:
    return layer >= keys['initial_moe_layer']
  assert keys['interleave_moe_layer']
  return layer % keys['expert_interval'] == 0
