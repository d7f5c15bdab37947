"""What routers do, added up over tokens that arrive in chunks.

  statistics = Statistics(num_experts=8)
  for ids in batches:
    statistics.add(model.routing(ids))
  statistics.mutual_information()

It reads `Routing`s and never a router's insides, so any gate and selection will
do. Memory does not grow with the number of tokens. `docs/analysis.md` has the
definitions; they are RMoE's (arXiv 2408.06793) unless another source is named.

  W  routers, from the lowest      I  bins of a histogram
  N  experts that an assignment    C  classes, or ids, of tokens
     can go to
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.routing.selection import Routing

DIGITS = 100  # bins over [0, 1] that probabilities are digitised into
ENTROPY_BINS = 100
QUANTILE_BINS = 4096
MAX_INNER_BALANCE = 1e9  # a larger one counts as infinite

_LIVE = 0.1  # of the even share, above which a pair counts as live
_CHUNK = 8192  # tokens that are measured at once
_WORD = 32
_EXPONENT = 120  # of 2: products of counts stay below in float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
  """Sums over tokens, from which everything else follows.

  Attributes, of jax or NumPy:
    tokens: The number of tokens.
    counts_WN: The assignments to every expert.
    log_shared_WW: The sum over tokens and over the router's probabilities of
      the logarithm of how many of them are in this one's bin in both routers.
    entropy_W: The sum of the entropy of the router's distribution, in nats.
    entropy_WI: The tokens by that entropy, bins from 0 to its highest value.
    inner_WI: The tokens by inner balance, bins even in its logarithm; the last
      bin holds those above `MAX_INNER_BALANCE`.
    outer_WI: The tokens by outer balance, bins from 0 to 1.
    together_WNN: The tokens that chose one expert in a router and another in
      the next above it; there is one router less.
  """

  tokens: Any
  counts_WN: Any
  log_shared_WW: Any
  entropy_W: Any
  entropy_WI: Any
  inner_WI: Any
  outer_WI: Any
  together_WNN: Any


class Statistics:
  """The statistics of the routers of a model, over all tokens added so far.

  Attributes:
    num_experts: N.
    num_probabilities: How many experts the routers rate, at least N.
    total: The `Sums` in NumPy's float64 and int64; None before the first token.
  """

  def __init__(self, num_experts: int) -> None:
    """Begins with no tokens.

    Args:
      num_experts: N; a router may rate more, which then stand for no expert.
    """
    self.num_experts = num_experts
    self.num_probabilities = num_experts
    self.total: Sums | None = None

  def add(
    self,
    routing: Routing | Sequence[Routing],
    real_T: jax.Array | np.ndarray | None = None,
  ) -> None:
    """Adds what the routers did with T tokens.

    Args:
      routing: What `Model.routing` returns, or the `Routing`s of the layers
        from the lowest; axes in front of the tokens' are taken as routers.
      real_T: Bool; False marks a token to leave out. Any shape of T elements.
    """
    joined: Routing = (
      routing
      if isinstance(routing, Routing)
      else jax.tree.map(lambda *a: jnp.stack(a), *routing)
    )
    num_tokens = None if real_T is None else np.size(real_T)
    joined = by_router(joined, num_tokens)
    num_tokens = joined.indices_TK.shape[1]
    real_T = np.ones(num_tokens, bool) if real_T is None else real_T
    real_T = np.asarray(real_T).reshape(-1)
    for start in range(0, num_tokens, _CHUNK):
      chunk = slice(start, start + _CHUNK)
      part = jax.tree.map(lambda a, chunk=chunk: a[:, chunk], joined)
      sums = _jitted_sums(part, real_T[chunk], num_experts=self.num_experts)
      self.add_sums(sums, joined.num_experts)

  def add_sums(self, sums: Sums, num_probabilities: int) -> None:
    """Adds what `sums_of` has returned.

    Args:
      sums: The sums.
      num_probabilities: How many probabilities a token has in each router.
    """
    self.num_probabilities = num_probabilities
    sums = jax.tree.map(_wide, sums)
    total = self.total
    self.total = sums if total is None else jax.tree.map(np.add, total, sums)

  def mutual_information(self) -> np.ndarray:
    """Returns the mutual information of any two routers, in nats, [W, W].

    It is `sklearn.metrics.mutual_info_score` between the digitised
    probabilities of two routers, token by token, and the mean over tokens
    (RMoE figure 3). On the diagonal is a router's own entropy.
    """
    # MI = mean_n log(c_ab(n) N / (c_a(n) c_b(n))), and c_aa is c_a.
    total, size = self._whole(), self.num_probabilities
    shared_WW = total.log_shared_WW / (total.tokens * size)
    own_W = np.diag(shared_WW)
    found_WW = shared_WW - own_W[:, None] - own_W + math.log(size)
    return np.maximum(found_WW, 0)  # which rounding may undercut

  def entropy_density(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns edges [I + 1] in nats, and the density of tokens [W, I].

    The entropy is -sum p log p of a token's distribution (RMoE figure 4).
    """
    total = self._whole()
    edges = np.linspace(0, _log_size(self.num_probabilities), ENTROPY_BINS + 1)
    return edges, total.entropy_WI / (total.tokens * (edges[1] - edges[0]))

  def mean_entropy(self) -> np.ndarray:
    """Returns the mean entropy of a token's distribution, in nats, [W]."""
    total = self._whole()
    return total.entropy_W / total.tokens

  def inner_balance(self, quantiles: Sequence[float]) -> np.ndarray:
    """Returns quantiles over tokens of the first probability over the second.

    They are RMoE's table 8, [W, quantiles]; infinite above
    `MAX_INNER_BALANCE`, NaN for a single expert. Within half a percent.
    """
    if self.num_probabilities < 2:
      return np.full((len(self._whole().counts_WN), len(quantiles)), np.nan)
    inner_WI = self._whole().inner_WI
    edges = np.linspace(0, math.log(MAX_INNER_BALANCE), QUANTILE_BINS)
    found = _quantiles(inner_WI, np.append(edges, np.inf), quantiles)
    return np.exp(found)

  def outer_balance(self, quantiles: Sequence[float]) -> np.ndarray:
    """Returns quantiles over tokens of the sum of the chosen probabilities.

    They are RMoE's table 8, [W, quantiles], to 1/4096.
    """
    edges = np.linspace(0, 1, QUANTILE_BINS + 1)
    return _quantiles(self._whole().outer_WI, edges, quantiles)

  def selection_frequency(self) -> np.ndarray:
    """Returns the share of tokens that chose each expert, [W, N]."""
    total = self._whole()
    return total.counts_WN / total.tokens

  def pairs(self, first: int) -> np.ndarray:
    """Returns how pairs of experts share the tokens, [N, N], sum 1.

    The pairs are of the router `first` and of the next above it. In a
    Cartesian layer they are its experts, the product A x B (arXiv 2410.16077).
    NaN where no token chose a pair.
    """
    together_NN = self._whole().together_WNN[first]
    return _ratio(together_NN, together_NN.sum())

  def agreement(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far the routers choose as those right below them do, [W].

    It is the share of the assignments whose expert has the number of one that
    the token chose below; and what that would be by chance, were the two
    choices of a token independent. NaN for the lowest router.
    """
    total = self._whole()
    same_W = np.trace(total.together_WNN, axis1=1, axis2=2)
    frequency_WN = self.selection_frequency()
    by_chance_W = (frequency_WN[1:] * total.counts_WN[:-1]).sum(1)
    assignments_W = total.counts_WN[1:].sum(1)
    none = [np.nan]
    return (
      np.concatenate([none, _ratio(same_W, assignments_W)]),
      np.concatenate([none, _ratio(by_chance_W, assignments_W)]),
    )

  def _whole(self) -> Sums:
    if self.total is None or not self.total.tokens:
      raise ValueError('no token has been added')
    return self.total


class TokenCounts:
  """Which tokens, by id or by class, go to which expert.

  Attributes:
    counts_WNC: The assignments to every expert of the tokens of each class;
      None before the first token.
    base_C: The tokens of each class.
  """

  def __init__(self, num_experts: int, num_classes: int) -> None:
    """Begins with no tokens."""
    self.counts_WNC: np.ndarray | None = None
    self.base_C = np.zeros(num_classes, np.int64)
    self._num_experts = num_experts

  def add(
    self, indices_WTK: np.ndarray, classes_T: np.ndarray, real_T: np.ndarray
  ) -> None:
    """Adds the assignments of T tokens.

    Args:
      indices_WTK: The chosen experts, N or more in an unused slot.
      classes_T: The class of each token; of one that is C or more nothing is
        counted.
      real_T: Bool; False marks a token to leave out.
    """
    size, num_classes = self._num_experts, len(self.base_C)
    if self.counts_WNC is None:
      shape = len(indices_WTK), size, num_classes
      self.counts_WNC = np.zeros(shape, np.int64)
    real_T = np.asarray(real_T) & (classes_T < num_classes)
    classes_T = np.asarray(classes_T)[real_T]
    self.base_C += np.bincount(classes_T, minlength=num_classes)
    for counts_NC, indices_TK in zip(
      self.counts_WNC, np.asarray(indices_WTK)[:, real_T], strict=True
    ):
      place_TK = indices_TK.astype(np.int64) * num_classes + classes_T[:, None]
      places = place_TK[indices_TK < size]
      if counts_NC.size <= 4 * places.size:
        counted = np.bincount(places, minlength=counts_NC.size)
        counts_NC += counted.reshape(counts_NC.shape)
      else:
        np.add.at(counts_NC.reshape(-1), places, 1)

  def shares(self) -> np.ndarray:
    """Returns the share of each class in every expert's tokens, [W, N, C].

    NaN for an expert that no token chose.
    """
    assert self.counts_WNC is not None, 'no token has been added'
    return _ratio(self.counts_WNC, self.counts_WNC.sum(-1, keepdims=True))

  def base(self) -> np.ndarray:
    """Returns the share of each class in all tokens, [C]."""
    return _ratio(self.base_C, self.base_C.sum())


def by_router(routing: Routing, num_tokens: int | None = None) -> Routing:
  """Returns the same with the axes [W, T, K] and [W, T, N].

  Args:
    routing: Arrays of several routers; [MoE layers, sub-layers, ..., T, K] or
      fewer axes in front of the tokens'.
    num_tokens: T, where tokens have several axes; None where it follows: all
      axes but the first two are tokens', or the first alone is the routers'.
  """
  *front, _ = routing.indices_TK.shape
  if num_tokens is None:
    num_tokens = math.prod(front[2:]) if len(front) > 2 else front[-1]
  return jax.tree.map(
    lambda a: a.reshape(-1, num_tokens, a.shape[-1]),
    dataclasses.replace(routing, seeds_TK=None),
  )


def sums_of(routing: Routing, real_T: jax.Array, num_experts: int) -> Sums:
  """Returns the sums over T tokens; a function to be jitted.

  Its memory is proportional to T.

  Args:
    routing: Arrays [W, T, K] and [W, T, N], of float32 and int32.
    real_T: Bool; False marks a token to leave out.
    num_experts: N; assignments to later ones are unused.
  """
  p_WTN = jnp.where(real_T[:, None], routing.probabilities_TN, 0)
  indices_WTK = routing.indices_TK
  experts_N = jnp.arange(num_experts)
  chosen_WTN = (indices_WTK[..., None] == experts_N).any(-2)
  chosen_WTN = (chosen_WTN & real_T[:, None]).astype(jnp.float32)
  together_WNN = jnp.einsum(
    'WTN,WTM->WNM',
    chosen_WTN[:-1],
    chosen_WTN[1:],
    precision=lax.Precision.HIGHEST,
  )
  entropy_WT = jax.scipy.special.entr(p_WTN).sum(-1)
  taken_WTN = jnp.where(chosen_WTN > 0, p_WTN[..., :num_experts], 0)
  histogram = functools.partial(_histogram, real_T=real_T)
  highest = _log_size(p_WTN.shape[-1])
  return Sums(
    tokens=real_T.sum(),
    counts_WN=chosen_WTN.sum(1).astype(jnp.int32),
    log_shared_WW=_log_shared(digitised(p_WTN), real_T),
    entropy_W=entropy_WT.sum(-1),
    entropy_WI=histogram(entropy_WT / highest * ENTROPY_BINS, ENTROPY_BINS),
    inner_WI=histogram(_log_inner_balance(p_WTN), QUANTILE_BINS),
    outer_WI=histogram(taken_WTN.sum(-1) * QUANTILE_BINS, QUANTILE_BINS),
    together_WNN=together_WNN.astype(jnp.int32),
  )


_jitted_sums = jax.jit(sums_of, static_argnames='num_experts')


def digitised(p: jax.Array) -> jax.Array:
  """Returns the bin of every probability, int32 from 0 to 99.

  Bin i is [i / 100, (i + 1) / 100), and the last one has 1 too: they are
  `np.digitize(p, np.linspace(0, 1, 101)) - 1`, but for p = 1, which that gives
  a bin of its own. No float32 falls on the wrong side of an edge.
  """
  edges = jnp.asarray(_edges())
  bins = jnp.clip((p * DIGITS).astype(jnp.int32), 0, DIGITS - 1)
  bins -= p < edges[bins]  # the product may have been rounded up
  return bins + (p >= edges[bins + 1])


def _edges() -> np.ndarray:
  """Returns the edges of the bins, each as the first float32 that is inside.

  Nothing is below the first and above the last.
  """
  exact = np.linspace(0, 1, DIGITS + 1)
  edges = exact.astype(np.float32)
  below = edges.astype(np.float64) < exact
  edges = np.where(below, np.nextafter(edges, np.float32(2)), edges)
  edges[0], edges[-1] = -np.inf, np.inf
  return edges


def _log_shared(bins_WTN: jax.Array, real_T: jax.Array) -> jax.Array:
  """Returns `Sums.log_shared_WW`.

  Each probability has a mask of N bits, those of its own bin, so that the
  number of probabilities that share its bin in two routers is one population
  count.
  """
  num_routers, num_tokens, size = bins_WTN.shape
  # Tokens last: they are the vectors. The barrier keeps the loops below from
  # digitising anew for every bit.
  bins_WNT = lax.optimization_barrier(jnp.swapaxes(bins_WTN, 1, 2))
  masks = [
    _masks(bins_WNT, first, min(_WORD, size - first))
    for first in range(0, size, _WORD)
  ]
  factors = max(1, math.floor(_EXPONENT / math.log2(max(2, size))))

  def of_pair(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    a, b = pair
    shared = [
      lax.population_count(words_WNT[a] & words_WNT[b]) for words_WNT in masks
    ]
    counts_NT = sum(shared, jnp.uint32(0)).astype(jnp.float32)
    log_T = jnp.zeros(num_tokens)
    # A logarithm of products: one for many counts.
    for first in range(0, size, factors):
      log_T += jnp.log(jnp.prod(counts_NT[first : first + factors], axis=0))
    return jnp.where(real_T, log_T, 0).sum()

  upper = np.triu_indices(num_routers)
  found = lax.map(of_pair, tuple(map(jnp.asarray, upper)))
  shared_WW = jnp.zeros((num_routers, num_routers)).at[upper].set(found)
  return shared_WW + jnp.triu(shared_WW, 1).T


def _masks(bins_WNT: jax.Array, first: int, count: int) -> jax.Array:
  """Returns which of `count` probabilities share a bin with each, uint32.

  Bit m is of the probability number `first + m`.
  """

  def with_bit(m: jax.Array, masks_WNT: jax.Array) -> jax.Array:
    other_W1T = lax.dynamic_slice_in_dim(bins_WNT, first + m, 1, 1)
    bit = (bins_WNT == other_W1T).astype(jnp.uint32)
    return masks_WNT | bit << m.astype(jnp.uint32)

  return lax.fori_loop(
    0, count, with_bit, jnp.zeros(bins_WNT.shape, jnp.uint32)
  )


def _log_inner_balance(p_WTN: jax.Array) -> jax.Array:
  """Returns the logarithm of inner balance in bins of its histogram."""
  first_WT = p_WTN.max(-1)
  best_WT1 = jnp.argmax(p_WTN, -1)[..., None]
  others_WTN = jnp.where(jnp.arange(p_WTN.shape[-1]) == best_WT1, 0, p_WTN)
  second_WT = others_WTN.max(-1)
  scale = (QUANTILE_BINS - 1) / math.log(MAX_INNER_BALANCE)
  return (jnp.log(first_WT) - jnp.log(second_WT)) * scale


def _histogram(
  place_WT: jax.Array, size: int, *, real_T: jax.Array
) -> jax.Array:
  """Returns the tokens in each of `size` bins, int32 [W, I].

  Args:
    place_WT: Where each token is, in bins from the first one's edge; what is
      beyond the last is in the last.
    size: I.
    real_T: Bool; False marks a token to leave out.
  """
  place_WT = jnp.where(real_T, place_WT, 0)
  bins_WT = jnp.clip(place_WT, 0, size - 1).astype(jnp.int32)
  routers_W1 = jnp.arange(len(place_WT))[:, None]
  counts = jnp.zeros((len(place_WT), size), jnp.int32)
  return counts.at[routers_W1, bins_WT].add(real_T.astype(jnp.int32))


def _quantiles(
  counts_WI: np.ndarray, edges: np.ndarray, quantiles: Sequence[float]
) -> np.ndarray:
  """Returns [W, quantiles], interpolated within a bin; inf in an open one."""
  found = np.empty((len(counts_WI), len(quantiles)))
  for row, counts_I in zip(found, counts_WI, strict=True):
    below_I = np.cumsum(counts_I)
    for i, quantile in enumerate(quantiles):
      rank = quantile * below_I[-1]
      bin = int(np.searchsorted(below_I, rank, side='left'))
      if not np.isfinite(edges[bin + 1]):
        row[i] = np.inf
        continue
      before = below_I[bin] - counts_I[bin]
      inside = (rank - before) / max(counts_I[bin], 1)
      row[i] = edges[bin] + inside * (edges[bin + 1] - edges[bin])
  return found


def product_use(shares_NN: np.ndarray) -> tuple[float, float]:
  """Returns how much of a product of experts is used.

  Args:
    shares_NN: How pairs share the tokens; see `Statistics.pairs`.

  Returns:
    live: The share of the pairs that have more than a tenth of the even share.
    entropy: The exponential of the entropy of the shares over the number of
      pairs: 1 where all are used alike.
  """
  live = (shares_NN > _LIVE / shares_NN.size).mean()
  used = shares_NN[shares_NN > 0]
  return float(live), math.exp(-(used * np.log(used)).sum()) / shares_NN.size


def stability(
  before_TK: np.ndarray, after_TK: np.ndarray, num_experts: int
) -> float:
  """Returns the share of assignments that are the same after as before.

  It is taken of the assignments before; NaN where there are none.

  Args:
    before_TK, after_TK: The chosen experts of the same tokens, N or more in an
      unused slot.
    num_experts: N.
  """
  used_TK = before_TK < num_experts
  same_TK = (before_TK[..., None] == after_TK[:, None]).any(-1)
  return float(_ratio((same_TK & used_TK).sum(), used_TK.sum()))


def drop_ratio(
  indices_TK: np.ndarray, num_experts: int, factor: float = 1.0
) -> float:
  """Returns the share of the assignments that find no room (RMoE table 11).

  Every expert takes `ceil(factor * assignments / N)` of all T tokens'. NaN
  where there are no assignments.

  Args:
    indices_TK: The chosen experts, N or more in an unused slot.
    num_experts: N.
    factor: The capacity factor.
  """
  chosen = indices_TK[indices_TK < num_experts]
  counts_N = np.bincount(chosen, minlength=num_experts)
  room = math.ceil(factor * len(chosen) / num_experts)
  return float(_ratio(np.maximum(counts_N - room, 0).sum(), len(chosen)))


def telling(
  shares_C: np.ndarray, base_C: np.ndarray, count: int
) -> list[tuple[int, float, float]]:
  """Returns the classes that tell an expert's tokens from all tokens best.

  They are ordered by share * log(lift), which is their part of the divergence
  of the expert's distribution from that of all tokens; those with a lift of 1
  or less are left out.

  Args:
    shares_C: Of the classes in the expert's tokens; NaN if it has none.
    base_C: Of the classes in all tokens.
    count: The most classes to return.

  Returns:
    The number, share and lift of each; the lift is its share over its base.
  """
  lift_C = _ratio(shares_C, base_C)
  [above] = np.nonzero(lift_C > 1)
  gain = shares_C[above] * np.log(lift_C[above])
  best = above[np.argsort(-gain, kind='stable')[:count]]
  return [(int(c), float(shares_C[c]), float(lift_C[c])) for c in best]


def similarity(matrices: Sequence[jax.Array]) -> jax.Array:
  """Returns the mean cosine of the experts of a layer (RMoE figure 5).

  Of every weight matrix of an expert the mean over its rows is taken, in
  PyTorch's layout, where a row makes one output; these are set to length 1 and
  joined. The cosine is a mean over all pairs of two experts; NaN for one.

  Args:
    matrices: Each kind of matrix of all experts, [N, inputs, outputs].
  """
  means = [matrix.astype(jnp.float32).mean(-1) for matrix in matrices]
  joined_NX = jnp.concatenate([_unit(mean) for mean in means], -1)
  cosine_NN = jnp.matmul(
    _unit(joined_NX), _unit(joined_NX).T, precision=lax.Precision.HIGHEST
  )
  count = len(cosine_NN)
  return (cosine_NN.sum() - jnp.trace(cosine_NN)) / (count * (count - 1))


def _unit(x: jax.Array) -> jax.Array:
  norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x / jnp.where(norm > 0, norm, 1)


def _log_size(size: int) -> float:
  """Returns the highest entropy there is, 1 where it would be 0."""
  return math.log(size) if size > 1 else 1.0


def _ratio(part, whole) -> np.ndarray:
  """Returns part / whole, NaN where whole is 0."""
  part, whole = np.asarray(part, float), np.asarray(whole, float)
  return np.divide(
    part,
    whole,
    out=np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan),
    where=whole != 0,
  )


def _wide(a: jax.Array) -> np.ndarray:
  """Returns an array in which sums over many chunks stay exact."""
  array = np.asarray(a)
  is_float = np.issubdtype(array.dtype, np.floating)
  return array.astype(np.float64 if is_float else np.int64)
