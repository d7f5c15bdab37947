"""Log-likelihoods of token sequences, in batches of few shapes.

Every process is asked for the same and gets all answers; the rows of a batch
are split over the mesh as those of an evaluation are.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import BATCH_AXES, eval_batch_size
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import multihost
from moe_jax.training import signals
from moe_jax.training.state import Setup
from moe_jax.training.step import Scores, make_score_step
from moe_jax.training.watchdog import waits_for

# Lengths of rows are multiples of it.
_LENGTH_STEP = 16
# What a compilation costs, in batches that could be computed in its time.
_COMPILATION = 8


class Request(NamedTuple):
  """A sequence whose last tokens are to be scored.

  Attributes:
    ids: Context and continuation, int32; `Scorer.longest` + 1 at the most.
    scored: How many of them are scored: fewer than there are, as the first
      token is predicted from nothing.
  """

  ids: np.ndarray
  scored: int


class Score(NamedTuple):
  """What a model says of a continuation.

  Attributes:
    log_likelihood: The sum over its tokens, in nats.
    is_greedy: Whether greedy decoding would have written it.
  """

  log_likelihood: float
  is_greedy: bool


class Batch(NamedTuple):
  """Requests that are computed together.

  Attributes:
    numbers: Which ones, a row each, int64.
    rows: B, at least as many.
    length: L.
  """

  numbers: np.ndarray
  rows: int
  length: int


class Scorer:
  """Scores continuations with a model's parameters.

  Attributes:
    longest: The tokens that are read at once at the most, `data.seq_len`.
  """

  def __init__(self, setup: Setup, params: Any) -> None:
    """Takes a model; nothing is compiled before it is called.

    Args:
      setup: The setup of the run.
      params: The model's parameters, where the setup's mesh has them.
    """
    self.longest = setup.config.data.seq_len
    self._params = params
    self._tokens = eval_batch_size(setup.config) * self.longest
    self._groups = math.prod(setup.mesh.shape[axis] for axis in BATCH_AXES)
    self._sharding = mesh_lib.batch_sharding(setup.mesh)
    self._step = make_score_step(setup)

  def __call__(
    self,
    requests: Sequence[Request],
    tell: Callable[[int], object] = lambda count: None,
  ) -> list[Score]:
    """Returns the score of every request; all processes call this alike.

    Args:
      requests: The sequences.
      tell: Is told how many have been scored since it was told.
    """
    found: dict[int, Score] = {}
    # The device works on the next batch while the host reads this one.
    begun = itertools.chain(self._begin(requests), [None])
    for this, _ in itertools.pairwise(begun):
      assert this is not None
      numbers, scores = this
      log_probability_BL = np.asarray(scores.log_probability_BL, np.float64)
      is_best_BL = np.asarray(scores.is_best_BL)
      for row, number in enumerate(numbers.tolist()):
        total = float(log_probability_BL[row].sum())
        found[number] = Score(total, bool(is_best_BL[row].all()))
      tell(len(numbers))
    return [found[number] for number in range(len(requests))]

  def _begin(
    self, requests: Sequence[Request]
  ) -> Iterator[tuple[np.ndarray, Scores]]:
    """Starts one batch after the other; yields its requests and its scores."""
    lengths = np.array([len(request.ids) - 1 for request in requests], int)
    for batch in batches(lengths, self._tokens, self.longest, self._groups):
      waits_for('a batch of requests')
      signals.check()
      rows = multihost.Rows(self._sharding, batch.rows)
      here = [
        requests[batch.numbers[row]] if row < len(batch.numbers) else None
        for row in rows.local
      ]
      arrays = rows.join(_arrays(here, batch.length))
      yield batch.numbers, self._step(self._params, arrays)


def batches(
  lengths: np.ndarray, tokens: int, longest: int, groups: int
) -> list[Batch]:
  """Returns batches of rows, the longest first.

  Args:
    lengths: The tokens of each row, int64.
    tokens: B * L at the most, unless `groups` rows are more.
    longest: The length that no row exceeds.
    groups: What divides every B.
  """
  made = []
  for numbers, length in _by_length(lengths, tokens, longest):
    most = max(tokens // length // groups, 1) * groups
    count = math.ceil(len(numbers) / most)
    # As even as can be, so that hardly a row of the last one is empty.
    rows = math.ceil(len(numbers) / count / groups) * groups
    made += [
      Batch(numbers[first : first + rows], rows, length)
      for first in range(0, len(numbers), rows)
    ]
  return made


def _by_length(
  lengths: np.ndarray, tokens: int, longest: int
) -> list[tuple[np.ndarray, int]]:
  """Returns rows sorted into lengths, the longest first.

  Each further length is a further shape to compile. They are as many, and
  those, that padding and compilations together take the least time; found from
  the shortest rows on, the best way for all up to some length being the best
  way for fewer and one length more.
  """
  rounded = np.minimum(-(-lengths // _LENGTH_STEP) * _LENGTH_STEP, longest)
  known, counts = np.unique(rounded, return_counts=True)
  below = np.concatenate([[0], np.cumsum(counts)])
  costs, begins = [0.0], [0]
  for end, length in enumerate(known.tolist(), start=1):
    padded = (below[end] - below[:end]) * length
    each = costs + padded + _COMPILATION * tokens
    begins.append(int(each.argmin()))
    costs.append(float(each.min()))
  found, end = [], len(known)
  while end:
    length = int(known[end - 1])
    wanted = (rounded <= length) & (rounded >= known[begins[end]])
    found.append((np.flatnonzero(wanted), length))
    end = begins[end]
  return found


def _arrays(
  requests: Sequence[Request | None], length: int
) -> dict[str, np.ndarray]:
  """Returns a batch of `training.step`; a row without request is padding."""
  shape = len(requests), length
  ids_BL, targets_BL = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  real_BL, scored_BL = np.zeros(shape, bool), np.zeros(shape, bool)
  for row, request in enumerate(requests):
    if request is None:
      continue
    end = len(request.ids) - 1
    ids_BL[row, :end] = request.ids[:-1]
    targets_BL[row, :end] = request.ids[1:]
    real_BL[row, :end] = True
    scored_BL[row, end - request.scored : end] = True
  return {
    'token_ids': ids_BL,
    'targets': targets_BL,
    'padding_mask': real_BL,
    'target_mask': scored_BL,
  }
