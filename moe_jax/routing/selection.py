"""From logits to the chosen experts and their weights."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_jax.parameter import BIAS_UPDATED, ROUTER, param
from moe_jax.registry import SELECTIONS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """What a router decided: all that experts and observers get to see.

  Attributes:
    weights_TK: The weight of each chosen expert, float32; 0 where an
      assignment is unused.
    indices_TK: The chosen experts, int32 in [0, N); N where an assignment is
      unused.
    probabilities_TN: The probability of every expert, float32; they sum to 1.
    logits_TN: The logits of the gate, float32.
    seeds_TK: The seed of the dropout in each assignment's expert, uint32; None
      where nothing is dropped.
  """

  weights_TK: jax.Array
  indices_TK: jax.Array
  probabilities_TN: jax.Array
  logits_TN: jax.Array
  seeds_TK: jax.Array | None = None

  @property
  def num_experts(self) -> int:
    """N, the number of experts to choose from."""
    return self.logits_TN.shape[-1]

  def only(self, used_TK: jax.Array) -> 'Routing':
    """Returns a routing whose assignments outside `used_TK` are unused.

    Args:
      used_TK: Bool, or [T, 1] for all of a token's assignments.
    """
    return dataclasses.replace(
      self,
      weights_TK=jnp.where(used_TK, self.weights_TK, 0.0),
      indices_TK=jnp.where(used_TK, self.indices_TK, self.num_experts),
    )

  def among(self, num_experts: int) -> 'Routing':
    """Returns what the first `num_experts` experts get to see.

    Assignments to later ones, which stand for no expert at all, are unused.
    """
    if num_experts == self.num_experts:
      return self
    exists_TK = self.indices_TK < num_experts
    return dataclasses.replace(
      self,
      weights_TK=jnp.where(exists_TK, self.weights_TK, 0.0),
      indices_TK=jnp.where(exists_TK, self.indices_TK, num_experts),
      probabilities_TN=self.probabilities_TN[:, :num_experts],
      logits_TN=self.logits_TN[:, :num_experts],
    )


class Picked(NamedTuple):
  """Experts picked for each token, best first.

  Attributes:
    indices_TK: The experts, int32 in [0, N).
    used_TK: Bool; False marks an assignment that stays unused.
  """

  indices_TK: jax.Array
  used_TK: jax.Array


class Pick(Protocol):
  """Picks experts for every token."""

  def __call__(self, choice_TN: jax.Array, scores_TN: jax.Array) -> Picked:
    """Returns what is picked by the order of `choice_TN`, float32."""
    ...


@dataclasses.dataclass(frozen=True)
class TopK:
  """The k best; of equal ones those with the lower index.

  Attributes:
    k: K.
    masked: Whether experts whose choice is -inf are left out, so that a token
      with fewer than K others has unused assignments.
  """

  k: int
  masked: bool = False

  def __call__(self, choice_TN: jax.Array, scores_TN: jax.Array) -> Picked:
    """Picks by `choice_TN`, in k passes over [T, N].

    The partitioner splits these by tokens like any other arithmetic;
    `jax.lax.top_k` it would run on every device for the tokens of all of them.
    """
    del scores_TN
    experts_N = jnp.arange(choice_TN.shape[-1], dtype=jnp.int32)
    left_TN, indices, used = choice_TN, [], []
    for _ in range(self.k):
      best_T = jnp.argmax(left_TN, axis=-1).astype(jnp.int32)
      if self.masked:
        used.append(left_TN.max(axis=-1) > -jnp.inf)
      left_TN = jnp.where(experts_N == best_T[:, None], -jnp.inf, left_TN)
      indices.append(best_T)
    indices_TK = jnp.stack(indices, axis=-1)
    if self.masked:
      return Picked(indices_TK, jnp.stack(used, axis=-1))
    return Picked(indices_TK, jnp.ones(indices_TK.shape, bool))


@dataclasses.dataclass(frozen=True)
class TopP:
  """The best until their probabilities sum to more than p.

  The expert that exceeds p is kept too (TopP baseline of CartesianMoE, arXiv
  2410.16077), so there is at least one, and K = N. An expert bias changes the
  order, not the probabilities that are added up.

  Attributes:
    p: The probability to exceed.
  """

  p: float

  def __call__(self, choice_TN: jax.Array, scores_TN: jax.Array) -> Picked:
    order_TN = jnp.argsort(-choice_TN, axis=-1, stable=True).astype(jnp.int32)
    sorted_TN = jnp.take_along_axis(scores_TN, order_TN, axis=-1)
    summed_TN = jnp.cumsum(sorted_TN, axis=-1)
    before_TN = jnp.pad(summed_TN[:, :-1], ((0, 0), (1, 0)))
    possible_TN = jnp.take_along_axis(choice_TN, order_TN, axis=-1) > -jnp.inf
    return Picked(order_TN, (before_TN <= self.p) & possible_TN)


class SelectOptions(NamedTuple):
  """What a selection needs to know; see `Select` for those not said here.

  Attributes:
    num_experts: N.
    top_k: The experts that each token visits.
    top_p: The probability that they have to exceed together.
    masked: Whether logits may be -inf; see `Gate.masks`.
  """

  num_experts: int
  top_k: int = 2
  top_p: float = 0.0
  weights: str = 'softmax'
  renormalize: bool = True
  groups: int = 1
  top_groups: int = 1
  disable_top: int = 0
  biased: bool = False
  masked: bool = False


class Disabled(nnx.Variable):
  """How many of the best experts a selection leaves out; see `Select`."""


class Select(nnx.Module):
  """Chooses experts by their scores, and weighs the chosen ones.

  Scores are the softmax over all experts (RMoE eq. 1), or the sigmoid of each
  (DeepSeek-V3, arXiv 2412.19437, eq. 15).

  Attributes:
    pick: `TopK` or `TopP`.
    num_logits: How many logits a gate has to make; N.
    weights: A key of `SCALES`; `chosen` is the softmax of the chosen logits.
    renormalize: Whether the chosen weights are divided by their sum. With k = 1
      this would make every weight 1 and leave the router without a gradient, so
      there it does nothing. (Softmax over the chosen logits is 1 there all the
      same.)
    groups, top_groups: Experts stand in `groups` equal groups; a token chooses
      from the `top_groups` whose two best experts add up to the most
      (DeepSeek-V3, section 2.1.2).
    disable_top: So many experts with the highest score are left out, token by
      token (CartesianMoE, table 4).
    disabled: How many of these really are, int32 [], where that is to be said
      at every call; None for all of them.
    choice_bias_N: The expert bias, added to the scores for the choice alone
      (auxiliary-loss-free balancing, arXiv 2408.15664); None without it.
  """

  def __init__(self, options: SelectOptions, pick: Pick):
    self.pick = pick
    self.num_logits = options.num_experts
    self.weights = options.weights
    self.renormalize = options.renormalize
    self.groups = options.groups
    self.top_groups = options.top_groups
    self.disable_top = options.disable_top
    self.disabled: Disabled | None = None
    bias_N = param(
      jnp.zeros(options.num_experts), part=ROUTER, update=BIAS_UPDATED
    )
    self.choice_bias_N = bias_N if options.biased else None

  def __call__(self, logits_TN: jax.Array) -> Routing:
    """Returns the `Routing` of float32 logits, best expert first."""
    scores_TN, logarithms_TN = SCALES[self.weights](logits_TN)
    # Kept for the backward pass: rounded otherwise, a second choice could give
    # the gradient to other experts than those that were asked.
    chosen = self.pick(self._choice(logits_TN, scores_TN), scores_TN)
    chosen = checkpoint_name(chosen, 'routing')
    routing = Routing(
      self.weigh(scores_TN, logarithms_TN, chosen),
      chosen.indices_TK,
      jax.nn.softmax(logarithms_TN, axis=-1),
      logits_TN,
    )
    return routing.only(chosen.used_TK)

  def weigh(
    self, scores_TN: jax.Array, logarithms_TN: jax.Array, chosen: Picked
  ) -> jax.Array:
    """Returns weights_TK of the chosen experts.

    They are the scores, over their sum where weights are to add up to 1. That
    quotient is a softmax of logarithms: dividing would give a gradient of NaN
    where every chosen score is 0 in float32.
    """
    several = chosen.indices_TK.shape[-1] > 1
    if self.weights == 'chosen' or (self.renormalize and several):
      logarithms_TK = take(logarithms_TN, chosen.indices_TK)
      return jax.nn.softmax(jnp.where(chosen.used_TK, logarithms_TK, -jnp.inf))
    return take(scores_TN, chosen.indices_TK)

  def balanced_counts(self, counts_N: jax.Array) -> jax.Array:
    """Returns the assignments that count as each expert's when they are evened.

    Args:
      counts_N: The assignments of each expert, float32 [..., N].
    """
    return counts_N

  def bias_gradient(self, counts_N: jax.Array) -> jax.Array:
    """Returns 0, with the gradient `counts - mean` in the expert bias.

    So the sign of the summed gradient says which way to step (arXiv
    2408.15664, algorithm 1), over any number of micro-batches and devices.
    """
    if self.choice_bias_N is None:
      return jnp.zeros(())
    excess_N = jax.lax.stop_gradient(counts_N - counts_N.mean())
    bias_N = self.choice_bias_N[...]
    return ((bias_N - jax.lax.stop_gradient(bias_N)) * excess_N).sum()

  def _choice(self, logits_TN: jax.Array, scores_TN: jax.Array) -> jax.Array:
    """Returns what experts are chosen by; -inf for those that cannot be.

    These are the scores where they are added up, otherwise the logits: their
    order is the same, and still one where scores are too close to 0 or 1 for
    float32.
    """
    logits_TN, choice_TN = jax.lax.stop_gradient((logits_TN, scores_TN))
    disabled = None if self.disabled is None else self.disabled[...]
    disabled_TN = _best(logits_TN, self.disable_top, disabled)
    if self.choice_bias_N is not None:
      choice_TN += jax.lax.stop_gradient(self.choice_bias_N[...])
    elif self.groups == 1:
      choice_TN = logits_TN
    choice_TN = jnp.where(disabled_TN, -jnp.inf, choice_TN)
    if self.groups == 1:
      return choice_TN
    choice_TJN = choice_TN.reshape(len(choice_TN), self.groups, -1)
    first_TJ, second_TJ1 = _two_best(choice_TJN)
    # Of a group that is closed but for one expert, this one counts alone.
    second_TJ1 = jnp.where(second_TJ1 == -jnp.inf, 0, second_TJ1)
    open_TJ = _best(first_TJ + second_TJ1.sum(-1), self.top_groups)
    return jnp.where(open_TJ[..., None], choice_TJN, -jnp.inf).reshape(
      choice_TN.shape
    )


def _best(
  values_TN: jax.Array, most: int, count: jax.Array | None = None
) -> jax.Array:
  """Returns which are the `most` largest values of each row, bool.

  Args:
    values_TN: The values.
    most: How many.
    count: int32 [], so many of these alone.
  """
  experts_N = jnp.arange(values_TN.shape[-1])
  if not most:
    return jnp.zeros(values_TN.shape, bool)
  best_TK = TopK(most)(values_TN, values_TN).indices_TK
  if count is not None:
    best_TK = jnp.where(jnp.arange(most) < count, best_TK, len(experts_N))
  return (best_TK[..., None] == experts_N).any(1)


def _two_best(values_TJN: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the largest along the last axis, and the second if there is one."""
  sorted_TJN = jnp.sort(values_TJN, axis=-1)
  return sorted_TJN[..., -1], sorted_TJN[..., -2:-1]


def _softmax(logits_TN: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jax.nn.softmax(logits_TN, axis=-1), logits_TN


def _sigmoid(logits_TN: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jax.nn.sigmoid(logits_TN), jax.nn.log_sigmoid(logits_TN)


def take(values_TN: jax.Array, indices_TK: jax.Array) -> jax.Array:
  """Returns values_TK by a sum: its gradient is one too, not a scatter."""
  experts_N = jnp.arange(values_TN.shape[-1])
  chosen_TKN = indices_TK[..., None] == experts_N
  return jnp.where(chosen_TKN, values_TN[:, None], 0).sum(-1)


# Makes of logits_TN the scores_TN and, but for a constant of the token, their
# logarithms.
SCALES = {
  'softmax': _softmax,
  'chosen': _softmax,  # the enwik8 code base of RMoE's experiments
  'sigmoid': _sigmoid,
}


@SELECTIONS.register('top_k')
def _top_k(options: SelectOptions) -> Select:
  return Select(options, TopK(options.top_k, options.masked))


@SELECTIONS.register('top_p')
def _top_p(options: SelectOptions) -> Select:
  return Select(options, TopP(options.top_p))
