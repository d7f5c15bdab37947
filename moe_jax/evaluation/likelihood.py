"""Log-likelihoods of token sequences, in batches of few shapes.

Requests share the rows of a batch, which so are full, and of one shape. Where
attention cannot keep them apart each has a row, beside others of like length.

Every process is asked for the same and gets all answers; the rows of a batch
are split over the mesh as those of an evaluation are.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import BATCH_AXES, eval_batch_size
from moe_jax.data.packing import best_fit
from moe_jax.errors import UserError
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import multihost
from moe_jax.training import signals, state
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
    numbers: Which ones, int64.
    row_of: The row of each, int64.
    begins: Where each begins in its row, int64; from left to right in a row.
    rows: B.
    length: L.
  """

  numbers: np.ndarray
  row_of: np.ndarray
  begins: np.ndarray
  rows: int
  length: int


class Scorer:
  """Scores continuations, each on its own.

  Attributes:
    longest: The tokens that are read at once at the most, `data.seq_len`.
  """

  def __init__(self, setup: Setup) -> None:
    """Takes the setup of a run; nothing is compiled before it is called."""
    self.longest = setup.config.data.seq_len
    self._rows = eval_batch_size(setup.config)
    self._groups = math.prod(setup.mesh.shape[axis] for axis in BATCH_AXES)
    self._shards = setup.mesh.shape[mesh_lib.CONTEXT]
    self._sharding = mesh_lib.batch_sharding(setup.mesh)
    setup, self._packs = _alone(setup)
    self._step = make_score_step(setup)

  def __call__(
    self,
    params: Any,
    requests: Sequence[Request],
    tell: Callable[[int], object] = lambda count: None,
  ) -> list[Score]:
    """Returns the score of every request; all processes call this alike.

    Args:
      params: The model's parameters, where the setup's mesh has them.
      requests: The sequences.
      tell: Is told how many have been scored since it was told.
    """
    found: dict[int, Score] = {}
    lengths = np.array([len(request.ids) - 1 for request in requests], int)
    # The device works on the next batch while the host reads this one.
    begun = itertools.chain(self._begin(params, requests, lengths), [None])
    for this, _ in itertools.pairwise(begun):
      assert this is not None
      batch, scores = this
      log_probability_BL = np.asarray(scores.log_probability_BL, np.float64)
      is_best_BL = np.asarray(scores.is_best_BL)
      for number, *place in _places(batch):
        row, own = place[0], slice(place[1], place[1] + lengths[number])
        total = float(log_probability_BL[row, own].sum())
        found[number] = Score(total, bool(is_best_BL[row, own].all()))
      tell(len(batch.numbers))
    return [found[number] for number in range(len(requests))]

  def _begin(
    self, params: Any, requests: Sequence[Request], lengths: np.ndarray
  ) -> Iterator[tuple[Batch, Scores]]:
    """Starts one batch after the other; yields it and its scores."""
    make = packed_batches
    if not self._packs:
      make = functools.partial(batches, shards=self._shards)
    for batch in make(lengths, self._rows, self.longest, self._groups):
      waits_for('a batch of requests')
      signals.check()
      rows = multihost.Rows(self._sharding, batch.rows)
      arrays = _arrays(requests, batch, rows.local)
      if not self._packs:
        del arrays['segment_ids'], arrays['positions']
      yield batch, self._step(params, rows.join(arrays))


def packed_batches(
  lengths: np.ndarray, rows: int, longest: int, groups: int
) -> list[Batch]:
  """Returns batches of full rows, all of one shape.

  Args:
    lengths: The tokens of each request, int64.
    rows: B at the most.
    longest: L, which no request exceeds.
    groups: What divides B; and `rows`.
  """
  order = np.argsort(-lengths, kind='stable')
  row_of = best_fit(lengths[order], longest)
  begins, filled = np.zeros_like(row_of), np.zeros(len(order), np.int64)
  for i, (row, length) in enumerate(zip(row_of, lengths[order], strict=True)):
    begins[i] = filled[row]
    filled[row] += length
  needed = int(row_of.max(initial=-1)) + 1
  # Another number of rows would be another shape, for the next requests too.
  rows = min(rows, math.ceil(needed / groups) * groups)
  made = []
  for first in range(0, needed, rows or 1):
    here = (first <= row_of) & (row_of < first + rows)
    made.append(
      Batch(order[here], row_of[here] - first, begins[here], rows, longest)
    )
  return made


def batches(
  lengths: np.ndarray, rows: int, longest: int, groups: int, shards: int = 1
) -> list[Batch]:
  """Returns batches of requests with a row each, the longest first.

  Args:
    lengths: The tokens of each request, int64.
    rows: B of the longest ones; of shorter ones it is more.
    longest: The length that no request exceeds.
    groups: What divides every B; and `rows`.
    shards: What divides every L; and `longest`.
  """
  made, tokens = [], rows * longest
  step = math.lcm(_LENGTH_STEP, shards)
  for numbers, length in _by_length(lengths, tokens, longest, step):
    most = max(tokens // length // groups, 1) * groups
    count = math.ceil(len(numbers) / most)
    # As even as can be, so that hardly a row of the last one is empty.
    rows = math.ceil(len(numbers) / count / groups) * groups
    for first in range(0, len(numbers), rows):
      here = numbers[first : first + rows]
      zeros = np.zeros_like(here)
      made.append(Batch(here, np.arange(len(here)), zeros, rows, length))
  return made


def _by_length(
  lengths: np.ndarray, tokens: int, longest: int, step: int
) -> list[tuple[np.ndarray, int]]:
  """Returns rows sorted into lengths, the longest first.

  Each further length is a further shape to compile. They are as many, and
  those, that padding and compilations together take the least time; found from
  the shortest rows on, the best way for all up to some length being the best
  way for fewer and one length more.
  """
  rounded = np.minimum(-(-lengths // step) * step, longest)
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


def _alone(setup: Setup) -> tuple[Setup, bool]:
  """Returns a setup where requests do not matter to each other.

  No token is dropped for others, whatever `moe.dispatch` says.

  Args:
    setup: The setup of a run.

  Returns:
    The setup, and whether its rows may have several requests.
  """
  config = setup.config.copy_and_resolve_references()
  config.moe.dispatch = 'dropless'
  if config.model.positions != 'span':
    packed = config.copy_and_resolve_references()
    packed.data.order = 'packed'
    # Refused with an attention that cannot keep them apart.
    with contextlib.suppress(UserError):
      return state.setup(packed, setup.vocab_size, setup.mesh), True
  return state.setup(config, setup.vocab_size, setup.mesh), False


def _places(batch: Batch) -> Iterator[tuple[int, int, int]]:
  """Yields the number of each request, its row and where it begins there."""
  return zip(
    batch.numbers.tolist(),
    batch.row_of.tolist(),
    batch.begins.tolist(),
    strict=True,
  )


def _arrays(
  requests: Sequence[Request], batch: Batch, local: Sequence[int]
) -> dict[str, np.ndarray]:
  """Returns some rows of a batch of `training.step`; the rest is padding."""
  shape = len(local), batch.length
  ids_BL, targets_BL = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  segments_BL, places_BL = np.zeros_like(ids_BL), np.zeros_like(ids_BL)
  scored_BL = np.zeros(shape, bool)
  here = {row: i for i, row in enumerate(local)}
  for number, row, begin in _places(batch):
    if row not in here:
      continue
    ids, scored = requests[number]
    i, end = here[row], begin + len(ids) - 1
    ids_BL[i, begin:end] = ids[:-1]
    targets_BL[i, begin:end] = ids[1:]
    segments_BL[i, begin:end] = segments_BL[i].max() + 1
    places_BL[i, begin:end] = np.arange(len(ids) - 1)
    scored_BL[i, end - scored : end] = True
  return {
    'token_ids': ids_BL,
    'targets': targets_BL,
    'padding_mask': segments_BL > 0,
    'target_mask': scored_BL,
    'segment_ids': segments_BL,
    'positions': places_BL,
  }
