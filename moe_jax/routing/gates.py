"""Gates: from a router's features to one logit per expert.

A gate is a subclass of `Gate` with `gate(features_TX, context) -> logits_TN`,
float32 in and out, where X is the width of the features: the hidden state or
the recurrent state. A new one is a class with a name in `GATES`, here or in a
config file of a user's own. Parameters whose names begin with `fixed_` are
drawn once and never trained.

Sources: RMoE (arXiv 2408.06793), table 1, and what it cites.
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.parameter import FIXED, LOGIT, param
from moe_jax.registry import GATES
from moe_jax.routing.matmul import matmul

__all__ = ['GATES', 'Gate', 'GateContext', 'GateOptions']

_START_TEMPERATURE = 0.3  # of the cosine gates; XMoE's released code


class GateOptions(NamedTuple):
  """What a gate may need to know to make its parameters.

  Attributes:
    num_features: X.
    num_experts: N.
    vocab_size: V.
    width: The width of the hidden layer of `MLPGate` and of `HyperGate`'s
      network.
    reduced_size: E, the size of `XMoEGate`'s expert embeddings.
    bias: Whether the linear, mlp and hyper gates have one.
    salt: A number that differs between the sub-layers of a layer, for gates
      that are hashes.
    init_std: The standard deviation of the initial weights.
    feature_std: The same of those that multiply the features.
  """

  num_features: int
  num_experts: int
  vocab_size: int
  width: int
  reduced_size: int
  bias: bool
  salt: int
  init_std: float
  feature_std: float


class GateContext(NamedTuple):
  """What a gate is told beside the features of the tokens.

  Attributes:
    token_ids_T: The vocabulary indices of the tokens, int32.
    padding_mask_T: Bool; False marks padding.
    step: The training step, int32; None in evaluation.
    rng: The key of the gate's random numbers; None in evaluation, and for a
      gate that draws none.
  """

  token_ids_T: jax.Array
  padding_mask_T: jax.Array
  step: jax.Array | None = None
  rng: jax.Array | None = None


class Gate(nnx.Module):
  """Rates every expert for every token.

  Attributes:
    draws: Whether the gate draws random numbers in training, and so needs
      `context.rng`.
    masks: Whether logits may be -inf: such an expert is never chosen, and a
      token with fewer than K others visits only those.
  """

  draws: ClassVar[bool] = False
  masks: ClassVar[bool] = False

  def __init__(self, options: GateOptions, *, rngs: nnx.Rngs):
    """Makes the parameters."""

  def __call__(self, features_TX: jax.Array, context: GateContext) -> jax.Array:
    """Returns logits_TN float32."""
    raise NotImplementedError


@GATES.register('linear')
class LinearGate(Gate):
  """Computes `features G + b` (RMoE eq. 1 and 6, which have no bias).

  Attributes:
    weight_XN: The weights G, float32.
    bias_N: The bias b, or None.
  """

  def __init__(self, options: GateOptions, *, rngs: nnx.Rngs):
    shape = options.num_features, options.num_experts
    self.weight_XN = _normal(
      options.feature_std, rngs, *shape, axes=(None, LOGIT)
    )
    self.bias_N = _zeros(options.num_experts) if options.bias else None

  def __call__(self, features_TX: jax.Array, context: GateContext) -> jax.Array:
    del context
    return _affine(features_TX, self.weight_XN, self.bias_N)


@GATES.register('mlp')
class MLPGate(Gate):
  """Has two layers with a GELU between them (SMoE-MLP), float32.

  Attributes:
    mlp_XF: The weights of the hidden layer.
    weight_FN: The weights from there to the logits.
    mlp_bias_F, bias_N: Their biases, or None.
  """

  def __init__(self, options: GateOptions, *, rngs: nnx.Rngs):
    self.mlp_XF = _normal(
      options.feature_std, rngs, options.num_features, options.width
    )
    self.weight_FN = _normal(
      options.init_std,
      rngs,
      options.width,
      options.num_experts,
      axes=(None, LOGIT),
    )
    self.mlp_bias_F = _zeros(options.width) if options.bias else None
    self.bias_N = _zeros(options.num_experts) if options.bias else None

  def __call__(self, features_TX: jax.Array, context: GateContext) -> jax.Array:
    del context
    hidden_TF = _affine(features_TX, self.mlp_XF, self.mlp_bias_F)
    hidden_TF = jax.nn.gelu(hidden_TF, approximate=False)
    return _affine(hidden_TF, self.weight_FN, self.bias_N)


@GATES.register('cosine')
class CosineGate(Gate):
  """Computes `cos(features, e_n) / temperature` (CosineMoE), float32.

  Attributes:
    embedding_NX: The embeddings e, one per expert.
    log_temperature: Learned in place of the temperature, which stays above 0.
  """

  def __init__(self, options: GateOptions, *, rngs: nnx.Rngs):
    shape = options.num_experts, options.num_features
    self.embedding_NX = _normal(
      options.feature_std, rngs, *shape, axes=(LOGIT, None)
    )
    self.log_temperature = _log_temperature()

  def __call__(self, features_TX: jax.Array, context: GateContext) -> jax.Array:
    del context
    cosine_TN = _cosine(features_TX, self.embedding_NX)
    return cosine_TN * jnp.exp(-self.log_temperature[...])


@GATES.register('xmoe')
class XMoEGate(Gate):
  """Computes `cos(features W, e_n) / temperature` in few dimensions.

  It is the gate of XMoE (arXiv 2204.09179).

  Attributes, float32:
    reduction_XE: The weights W.
    embedding_NE: The embeddings e, one per expert.
    log_temperature: The same as in `CosineGate`.
  """

  def __init__(self, options: GateOptions, *, rngs: nnx.Rngs):
    size = options.reduced_size
    self.reduction_XE = _normal(
      options.feature_std, rngs, options.num_features, size
    )
    self.embedding_NE = _normal(
      options.init_std, rngs, options.num_experts, size, axes=(LOGIT, None)
    )
    self.log_temperature = _log_temperature()

  def __call__(self, features_TX: jax.Array, context: GateContext) -> jax.Array:
    del context
    reduced_TE = _affine(features_TX, self.reduction_XE, None)
    cosine_TN = _cosine(reduced_TE, self.embedding_NE)
    return cosine_TN * jnp.exp(-self.log_temperature[...])


@GATES.register('hyper')
class HyperGate(Gate):
  """Is a linear gate whose G and b a fixed random network makes (HyperMoE).

  Only the network's input, one embedding per layer, is trained; float32.

  Attributes:
    embedding_X: What the network reads.
    fixed_up_XF, fixed_up_bias_F: The hidden layer, with a GELU.
    fixed_weights_FXN, fixed_weights_bias_XN: The layer from there to G.
    fixed_bias_FN, fixed_bias_bias_N: The layer from there to b; None without
      a bias.
  """

  def __init__(self, options: GateOptions, *, rngs: nnx.Rngs):
    features, experts = options.num_features, options.num_experts
    width = options.width

    def fixed(fan_in: int, *shape: int) -> nnx.Param:
      # Keeps the size of what passes: the network is never trained to.
      draw = jax.random.normal(rngs.params(), shape)
      return param(draw * fan_in**-0.5, update=FIXED, matmuls=0)

    self.embedding_X = param(
      jax.random.normal(rngs.params(), (features,)), decay=True
    )
    self.fixed_up_XF = fixed(features, features, width)
    self.fixed_up_bias_F = _zeros(width, update=FIXED)
    # G meets the features next, so it is scaled for their number too.
    self.fixed_weights_FXN = fixed(width * features, width, features, experts)
    # Of G's shape, it counts for G, by which every token multiplies and through
    # which the embedding gets its gradient.
    self.fixed_weights_bias_XN = _zeros(
      features, experts, update=FIXED, matmuls=1, passes=3
    )
    bias = options.bias
    self.fixed_bias_FN = fixed(width, width, experts) if bias else None
    self.fixed_bias_bias_N = _zeros(experts, update=FIXED) if bias else None

  def __call__(self, features_TX: jax.Array, context: GateContext) -> jax.Array:
    del context
    hidden_F = jax.nn.gelu(
      _through(self.embedding_X[...], self.fixed_up_XF, self.fixed_up_bias_F),
      approximate=False,
    )
    weight_XN = _through(
      hidden_F, self.fixed_weights_FXN, self.fixed_weights_bias_XN
    )
    logits_TN = matmul(features_TX, weight_XN)
    if self.fixed_bias_FN is None:
      return logits_TN
    assert self.fixed_bias_bias_N is not None  # both are there, or neither
    return logits_TN + _through(
      hidden_F, self.fixed_bias_FN, self.fixed_bias_bias_N
    )


@GATES.register('random')
class RandomGate(Gate):
  """Is a linear gate that is never trained (RandomMoE).

  Attributes:
    fixed_weight_XN: The weights G.
  """

  def __init__(self, options: GateOptions, *, rngs: nnx.Rngs):
    shape = options.num_features, options.num_experts
    self.fixed_weight_XN = _normal(
      options.feature_std, rngs, *shape, update=FIXED
    )

  def __call__(self, features_TX: jax.Array, context: GateContext) -> jax.Array:
    del context
    weight_XN = jax.lax.stop_gradient(self.fixed_weight_XN[...])
    return matmul(features_TX, weight_XN)


@GATES.register('hash')
class HashGate(Gate):
  """Looks logits up by token id: CartesianMoE's Hash Layer baseline.

  The table is the same in every layer, as in the released code, and for every
  seed; sub-layers of a layer differ, or a Cartesian layer would use only the
  pairs (i, i).

  Attributes:
    fixed_table_VN: The logits, drawn from the standard normal distribution.
  """

  def __init__(self, options: GateOptions, *, rngs: nnx.Rngs):
    del rngs
    shape = options.vocab_size, options.num_experts
    self.fixed_table_VN = param(
      jax.random.normal(jax.random.key(options.salt), shape),
      update=FIXED,
      matmuls=0,
      counted=False,  # as in CartesianMoE's published sizes
    )

  def __call__(self, features_TX: jax.Array, context: GateContext) -> jax.Array:
    del features_TX
    return jax.lax.stop_gradient(self.fixed_table_VN[...])[context.token_ids_T]


def _normal(
  std: float, rngs: nnx.Rngs, *shape: int, **declared: Any
) -> nnx.Param:
  init = nnx.initializers.normal(std)
  return param(init(rngs.params(), shape, jnp.float32), decay=True, **declared)


def _zeros(*shape: int, **declared: Any) -> nnx.Param:
  return param(jnp.zeros(shape, jnp.float32), **declared)


def _log_temperature() -> nnx.Param:
  return param(jnp.log(jnp.float32(_START_TEMPERATURE)))


def _affine(
  x_TX: jax.Array, weight_XO: nnx.Param, bias_O: nnx.Param | None
) -> jax.Array:
  y_TO = matmul(x_TX, weight_XO[...])
  return y_TO if bias_O is None else y_TO + bias_O[...]


def _through(x_X: jax.Array, weight: nnx.Param, bias: nnx.Param) -> jax.Array:
  """Returns what an untrained layer of any shape makes of one vector."""
  fixed_weight, fixed_bias = jax.lax.stop_gradient((weight[...], bias[...]))
  y = jnp.tensordot(x_X, fixed_weight, 1, precision=jax.lax.Precision.HIGHEST)
  return y + fixed_bias


def _cosine(x_TE: jax.Array, embedding_NE: nnx.Param) -> jax.Array:
  return matmul(_unit(x_TE), _unit(embedding_NE[...]).T)


def _unit(x: jax.Array) -> jax.Array:
  """Returns vectors of length 1 along the last axis; a zero stays 0."""
  squares = jnp.square(x).sum(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
