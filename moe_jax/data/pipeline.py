"""Batches of token sequences: what a step reads.

The batches are a function of (seed, step) on the whole split. A process makes
only the rows that it is asked for, so how many processes there are changes
nothing, and the position that a checkpoint keeps is the number of steps read.
"""

import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from moe_jax.data.mixtures import Mixture
from moe_jax.data.orders import EvaluationRows, InOrder, in_order
from moe_jax.data.sequences import TokenSequences

Batch = dict[str, np.ndarray]


def train_batches(
  mixture: Mixture,
  *,
  rows: Sequence[int],
  seed: int,
  start: int,
  threads: int,
) -> grain.DatasetIterator:
  """Returns this process's part of the batches, from step `start` on.

  A batch is token_ids, targets int32 and padding_mask bool, all [rows, L], and
  `segment_start` bool [rows] if the order is contiguous, `segment_ids` and
  `positions` int32 [rows, L] if it is packed. Of several sources it also has
  the number of each row's `source`, int32 [rows]. `close` ends the threads that
  read ahead.

  Args:
    mixture: What is read, and in which order.
    rows: The rows of the global batch that this process holds, in its order.
    seed: The seed of the order; only its lowest 32 bits count.
    start: The first step to read, 0 or the number of steps done.
    threads: The threads that read ahead; 0 reads when a batch is asked for.

  Raises:
    UserError: A source has too few tokens for its order.
  """
  rows = [int(row) for row in rows]
  sequence = mixture.rows(seed % 2**32)

  def read(step: int) -> Batch:
    return _stack([sequence(step, row) for row in rows])

  # The elements are whole steps, so one thread hand-over costs one step's rows.
  steps = grain.MapDataset.range(start, sys.maxsize // mixture.batch_size).map(
    read
  )
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=2 * threads
  )
  return iter(steps.to_iter_dataset(options))


def num_batches(sequences: InOrder, batch_size: int) -> int:
  """Returns how many batches hold all sequences once."""
  return -(-len(sequences) // batch_size)


def eval_batches(
  sequences: TokenSequences,
  *,
  batch_size: int,
  rows: Sequence[int],
  order: str = 'shuffled',
) -> Iterator[Batch]:
  """Yields this process's rows of the whole split, in order, once.

  Every token is a target once, and every process yields the same number of
  batches; what a batch lacks is filled up with padding, whose mask is False.
  Where training is contiguous so is this: a row goes on in the next batch where
  it stopped in this one. Where it is packed, so is this.

  Args:
    sequences: The split.
    batch_size: The sequences of a batch, over all processes.
    rows: As in `train_batches`.
    order: A key of `ORDERS`.
  """
  if order == 'contiguous':
    whole = EvaluationRows(sequences, batch_size)
    for step in range(len(whole)):
      yield _stack([whole.at(step, row) for row in rows])
    return
  rows_in_order = in_order(sequences, order)
  for i in range(num_batches(rows_in_order, batch_size)):
    yield _stack([rows_in_order.at(i * batch_size + row) for row in rows])


def _stack(parts: list[Batch]) -> Batch:
  """Returns the sequences as the rows of one batch."""
  return {key: np.stack([part[key] for part in parts]) for key in parts[0]}
