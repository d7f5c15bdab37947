"""Orders in which a run reads the token sequences of a split.

`shuffled` draws them anew in every epoch. `contiguous` is for models with a
memory: the stream of a split is cut into as many equal parts as a batch has
rows, and step s reads the next segment of every part, so a row's memory of the
segment before is right for this one. Where it is not, the batch says so:
`segment_start` is True. `packed` has whole documents side by side in its rows,
and says in `segment_ids` and `positions` which is where.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import grain
import numpy as np

from moe_jax import errors
from moe_jax.data.sequences import TokenSequence, TokenSequences


class ContiguousRows:
  """The segments of a run's steps, a function of (seed, step) on the stream.

  An epoch ends where not every row has a whole segment left, and the next one
  begins at an offset below the length of a segment, so that it cuts the text
  elsewhere (as released). The first begins at 0; the others all have as many
  steps as there are segments behind the largest offset.
  """

  def __init__(
    self, sequences: TokenSequences, num_rows: int, seed: int
  ) -> None:
    """Cuts the stream; what does not fill the rows is left out.

    Args:
      sequences: The split.
      num_rows: The rows of a batch, over all processes.
      seed: The seed of the offsets.

    Raises:
      UserError: The rows are shorter than a segment.
    """
    self._sequences = sequences
    self._seed = seed
    self._row_tokens = sequences.num_stream_tokens // num_rows
    if self._row_tokens <= sequences.seq_len:
      raise errors.UserError(
        f"data.order = 'contiguous': {num_rows} rows, of train.batch_size, cut"
        f' the {sequences.num_stream_tokens} tokens into parts of'
        f' {self._row_tokens}, but data.seq_len = {sequences.seq_len} needs'
        f' {sequences.seq_len + 1}; lower one of them'
      )
    length = sequences.seq_len
    # One segment, and the token after it, fit whatever the offset.
    self._bound = min(length, self._row_tokens - length)
    self._first_steps = (self._row_tokens - 1) // length
    # As many as fit at the largest offset, so that no epoch has to be counted.
    self._steps = (self._row_tokens - self._bound) // length
    # All rows of a step ask for the same one; two are read side by side.
    self._offset = functools.lru_cache(2)(self._draw)

  def at(self, step: int, row: int) -> TokenSequence:
    """Returns the sequence of a row at a step; says if the row starts anew."""
    nth, offset = self._locate(step)
    length = self._sequences.seq_len
    begin = row * self._row_tokens + offset + nth * length
    sequence = self._sequences.read(begin, length)
    return sequence | {'segment_start': np.array(nth == 0)}

  def _locate(self, step: int) -> tuple[int, int]:
    """Returns the number of a step in its epoch, and the epoch's offset."""
    if step < self._first_steps:
      return step, 0
    later, nth = divmod(step - self._first_steps, self._steps)
    return nth, self._offset(later + 1)

  def _draw(self, epoch: int) -> int:
    rng = np.random.default_rng((self._seed, epoch))
    return int(rng.integers(self._bound))


class EvaluationRows:
  """A split in order, once: every token is the target of one row and step."""

  def __init__(self, sequences: TokenSequences, num_rows: int) -> None:
    self._sequences = sequences
    self._row_tokens = -(-sequences.num_tokens // num_rows)

  def __len__(self) -> int:
    """Returns the number of steps."""
    return -(-self._row_tokens // self._sequences.seq_len)

  def at(self, step: int, row: int) -> TokenSequence:
    """Returns the sequence of a row at a step, masked after the row's end."""
    begin = step * self._sequences.seq_len
    left = self._row_tokens - begin
    count = min(self._sequences.seq_len, left)
    sequence = self._sequences.read(row * self._row_tokens + begin, count)
    return sequence | {'segment_start': np.array(step == 0)}


class PackedRows:
  """The packed rows of a run's steps, a function of (seed, step).

  The rows of `TokenSequences.packing`, shuffled anew in every epoch, in which
  every token that can be a target is one once. An epoch may end inside a batch.
  """

  def __init__(
    self, sequences: TokenSequences, num_rows: int, seed: int
  ) -> None:
    """Packs the documents.

    Args:
      sequences: The split.
      num_rows: The rows of a batch, over all processes.
      seed: The seed of the order.
    """
    self._sequences = sequences
    self._num_rows = num_rows
    packing = sequences.packing
    self._stream = grain.MapDataset.range(len(packing)).shuffle(seed).repeat()
    # Two: a batch may begin in one epoch and end in the next.
    self._drawn = functools.lru_cache(2)(functools.partial(packing.drawn, seed))

  def at(self, step: int, row: int) -> TokenSequence:
    """Returns the sequence of a row at a step."""
    n = step * self._num_rows + row
    packing = self._sequences.packing
    arrangement = self._drawn(n // len(packing))
    pieces = packing.pieces(arrangement, self._stream[n])
    return _side_by_side(self._sequences, pieces)


class PackedInOrder:
  """A split's packed rows, once, in the order of their first documents."""

  def __init__(self, sequences: TokenSequences) -> None:
    self._sequences = sequences
    self._arrangement = sequences.packing.in_order()
    self._rows = sequences.packing.by_first(self._arrangement)

  def __len__(self) -> int:
    """Returns the number of rows."""
    return len(self._rows)

  def at(self, i: int) -> TokenSequence:
    """Returns row `i`; past the last one it is all padding."""
    pieces = np.zeros(0, int)
    if i < len(self):
      packing = self._sequences.packing
      pieces = packing.pieces(self._arrangement, self._rows[i])
    return _side_by_side(self._sequences, pieces)


def _side_by_side(
  sequences: TokenSequences, pieces: np.ndarray
) -> TokenSequence:
  """Returns a row of some pieces of the packing, and padding after them."""
  packing, begin = sequences.packing, 0
  row = sequences.read(0, 0)
  row['segment_ids'], row['positions'] = np.zeros(
    (2, sequences.seq_len), np.int32
  )
  for number, piece in enumerate(pieces, start=1):
    size = packing.sizes[piece]
    here = slice(begin, begin + size)
    read = sequences.read(packing.begins[piece], size)
    for key, array in read.items():
      row[key][here] = array[:size]
    row['segment_ids'][here] = number
    row['positions'][here] = np.arange(size)
    begin += size
  return row


class InOrder(Protocol):
  """The rows of a split, each target once."""

  def __len__(self) -> int:
    """Returns the number of rows."""
    ...

  def at(self, i: int) -> TokenSequence:
    """Returns row `i`; past the last one it is all padding."""
    ...


def num_rows(sequences: TokenSequences, order: str) -> int:
  """Returns how many rows of a split a model of that order reads."""
  return len(sequences.packing if order == 'packed' else sequences)


def in_order(sequences: TokenSequences, order: str) -> InOrder:
  """Returns the rows of a split in order, as a model of that order reads."""
  return PackedInOrder(sequences) if order == 'packed' else sequences


def _shuffled(
  sequences: TokenSequences, batch_size: int, seed: int
) -> Callable[[int, int], TokenSequence]:
  """Returns a function to sequence s * batch_size + row of a shuffled stream.

  The stream is shuffled anew in every epoch; an epoch may end inside a batch.
  """
  stream = grain.MapDataset.source(sequences).shuffle(seed).repeat()
  return lambda step, row: stream[step * batch_size + row]


# (sequences, batch_size, seed) -> the sequence of (step, row).
ORDERS = {
  'shuffled': _shuffled,
  'contiguous': lambda *arguments: ContiguousRows(*arguments).at,
  'packed': lambda *arguments: PackedRows(*arguments).at,
}
