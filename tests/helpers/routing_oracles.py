"""Cells, gates and their chain from the equations, in float64 numpy.

Token by token and expert by expert, without jax: a second derivation to hold
the library against. Weights are the library's leaves, by their names.
`choosing` goes on from the logits.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

Array = np.ndarray
Weights = Mapping[str, Any]


# Cells: (u_X, state, weights) -> state; a state's first part is what is read.
State = tuple[Array, ...]


def memoryless(u_X: Array, state: State, weights: Weights) -> State:
  """No recurrence: the input itself is read."""
  return (u_X,)


def gru(u_X: Array, state: State, weights: Weights) -> State:
  """RMoE eq. 2-3, gate by gate, with PyTorch's two biases."""
  (h_R,) = state
  r = sigmoid(read(u_X, weights, 0) + recall(h_R, weights, 0))
  z = sigmoid(read(u_X, weights, 1) + recall(h_R, weights, 1))
  n = np.tanh(read(u_X, weights, 2) + r * recall(h_R, weights, 2))
  return ((1 - z) * n + z * h_R,)


def rnn(u_X: Array, state: State, weights: Weights) -> State:
  """h' = tanh(W u + b + U h + c), as torch.nn.RNNCell."""
  (h_R,) = state
  input_R = u_X @ weights['input_XR'] + weights['input_bias_R']
  return (
    np.tanh(input_R + h_R @ weights['hidden_RR'] + weights['hidden_bias_R']),
  )


def lstm(u_X: Array, state: State, weights: Weights) -> State:
  """torch.nn.LSTMCell: gates i, f, g, o; the state is (h, c)."""
  h_R, c_R = state

  def gate(n: int) -> Array:
    return read(u_X, weights, n, gates=4) + recall(h_R, weights, n, gates=4)

  c_R = sigmoid(gate(1)) * c_R + sigmoid(gate(0)) * np.tanh(gate(2))
  return sigmoid(gate(3)) * np.tanh(c_R), c_R


def read(u_X: Array, weights: Weights, gate: int, gates: int = 3) -> Array:
  weight_XR = weights[f'input_X{gates}R'][:, gate]
  return u_X @ weight_XR + weights[f'input_bias_{gates}R'][gate]


def recall(h_R: Array, weights: Weights, gate: int, gates: int = 3) -> Array:
  weight_RR = weights[f'hidden_R{gates}R'][:, gate]
  return h_R @ weight_RR + weights[f'hidden_bias_{gates}R'][gate]


CELLS: dict[str, Callable[[Array, State, Weights], State]] = {
  'none': memoryless,
  'gru': gru,
  'rnn': rnn,
  'lstm': lstm,
}


def start(cell: str, state_size: int) -> State:
  zero = np.zeros(state_size)
  return (zero, zero) if cell == 'lstm' else (zero,)


# Scores: (x_X, token id, weights) -> logits_N.


def linear(x_X: Array, token: int, weights: Weights) -> Array:
  return x_X @ weights['weight_XN'] + weights.get('bias_N', 0.0)


def mlp(x_X: Array, token: int, weights: Weights) -> Array:
  hidden_F = gelu(x_X @ weights['mlp_XF'] + weights.get('mlp_bias_F', 0.0))
  return hidden_F @ weights['weight_FN'] + weights.get('bias_N', 0.0)


def cosine(x_X: Array, token: int, weights: Weights) -> Array:
  return cosines(x_X, weights['embedding_NX'], weights['log_temperature'])


def xmoe(x_X: Array, token: int, weights: Weights) -> Array:
  """XMoE (arXiv 2204.09179): cosine in a space of few dimensions."""
  x_E = x_X @ weights['reduction_XE']
  return cosines(x_E, weights['embedding_NE'], weights['log_temperature'])


def cosines(x_E: Array, embedding_NE: Array, log_temperature: float) -> Array:
  similar = [
    x_E @ e_E / (np.linalg.norm(x_E) * np.linalg.norm(e_E))
    for e_E in embedding_NE
  ]
  return np.array(similar) / math.exp(log_temperature)


def hyper(x_X: Array, token: int, weights: Weights) -> Array:
  """HyperMoE: a fixed network makes the router from a learned embedding."""
  hidden_F = gelu(
    weights['embedding_X'] @ weights['fixed_up_XF'] + weights['fixed_up_bias_F']
  )
  made_XN = weights['fixed_weights_bias_XN'].copy()
  for hidden, weights_XN in zip(
    hidden_F, weights['fixed_weights_FXN'], strict=True
  ):
    made_XN += hidden * weights_XN
  if 'fixed_bias_FN' not in weights:
    return x_X @ made_XN
  bias_N = hidden_F @ weights['fixed_bias_FN'] + weights['fixed_bias_bias_N']
  return x_X @ made_XN + bias_N


def random(x_X: Array, token: int, weights: Weights) -> Array:
  return x_X @ weights['fixed_weight_XN']


def hashed(x_X: Array, token: int, weights: Weights) -> Array:
  """A fixed table row per token of the vocabulary."""
  return weights['fixed_table_VN'][token]


GATES: dict[str, Callable[[Array, int, Weights], Array]] = {
  'linear': linear,
  'mlp': mlp,
  'cosine': cosine,
  'xmoe': xmoe,
  'hyper': hyper,
  'random': random,
  'hash': hashed,
}


class Routers:
  """The routers of all MoE sub-layers in turn, on the tokens of one sequence.

  Attributes:
    states: of every sub-layer, the states of all tokens before it.
    logits: of every sub-layer, as it used them: its residual included.
  """

  def __init__(
    self,
    router: ConfigDict,
    cell: Weights | None,
    constants: 'Routers | None' = None,
  ) -> None:
    """Stands before the first sub-layer.

    Args:
      router: the section of the config.
      cell: weights of the shared cell, None without one.
      constants: what detached values are read from, so that finite
        differences do not see through them; None reads them from this run.
    """
    self.router = router
    self.cell = None if cell is None else f64(cell)
    self.constants = self if constants is None else constants
    self.states: list[list[State]] = []
    self.logits: list[Array] = []
    self.last: list[State] = []

  def __call__(self, u_TD: Array, params: Any, ids_T: Array) -> Array:
    """The next sub-layer's logits_TN from its input."""
    params = f64(params)
    x_TX = u_TD
    if self.router.recurrent != 'none':
      x_TX = self.advance(u_TD, params.get('features', {}))
    score = GATES[self.router.score]
    logits_TN = np.stack(
      [
        score(x_X, int(token), params['score'])
        for x_X, token in zip(x_TX, ids_T, strict=True)
      ]
    )
    if self.logits and self.router.residual:
      detached = self.router.residual_detached
      source = self.constants if detached else self
      before = source.logits[len(self.logits) - 1]
      logits_TN = logits_TN + self.router.residual * before
    self.logits.append(logits_TN)
    return logits_TN

  def advance(self, u_TD: Array, features: Weights) -> Array:
    """RMoE eq. 4-5: every token's state takes one step."""
    if self.router.projector == 'layerwise':
      u_TD = u_TD @ features['project']['projector_DR']
    assert self.cell is not None, 'a recurrent router has one'
    if not self.last or self.router.passing == 'none':
      zero = start(self.router.recurrent, self.router.state_size)
      self.last = [zero] * len(u_TD)
    self.states.append(self.last)
    if self.router.passing == 'detached':
      self.last = self.constants.states[len(self.states) - 1]
    step = CELLS[self.router.recurrent]
    self.last = [
      step(u_X, state, self.cell)
      for u_X, state in zip(u_TD, self.last, strict=True)
    ]
    return np.stack([state[0] for state in self.last])


def f64(tree: Any) -> Any:
  if isinstance(tree, Mapping):
    return {name: f64(leaf) for name, leaf in tree.items()}
  return np.asarray(tree, np.float64)


def gelu(x: Array) -> Array:
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def sigmoid(x: Array) -> Array:
  return np.exp(-np.logaddexp(0, -x))


def softmax(x: Array) -> Array:
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)
