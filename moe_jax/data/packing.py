"""Best-fit packing: which documents of a split share a row.

Best-fit decreasing, as in Fewer Truncations Improve Language Modeling (arXiv
2404.10830): the longest first, each into the row with the least room that is
enough. grain's own packers are iterators, whose state no step number gives;
this is a table.
"""

import bisect
import itertools

import numpy as np


class Packing:
  """The rows that documents are packed into, a function of lengths alone.

  A document with more positions than a row is cut into pieces that fill rows,
  and a last one; what is packed are pieces. Which lengths meet in a row is the
  same in every epoch, and so is the number of rows, which makes the epoch and
  row of any step plain arithmetic. Which of equally long pieces stands where,
  seed and epoch decide: `drawn`.

  Attributes:
    begins: Where each piece begins, in positions of all documents one after
      the other, int64 [pieces].
    sizes: The positions of each piece, int64 [pieces].
    waste: The share of the positions of all rows that are padding.
  """

  def __init__(self, positions: np.ndarray, seq_len: int) -> None:
    """Packs the documents.

    Args:
      positions: The positions that each document takes, int64 [documents].
      seq_len: L, the positions of a row.
    """
    counts = -(-positions // seq_len)
    first = np.cumsum(counts) - counts
    document = np.repeat(np.arange(len(positions)), counts)
    offset = (np.arange(len(document)) - first[document]) * seq_len
    self.begins = (np.cumsum(positions) - positions)[document] + offset
    self.sizes = np.minimum(positions[document] - offset, seq_len)
    # Slots are places for pieces, the longest first.
    self._in_order = np.argsort(-self.sizes, kind='stable')
    row_of_slot = best_fit(self.sizes[self._in_order], seq_len)
    self._slots = np.argsort(row_of_slot, kind='stable')
    self._starts = np.concatenate([[0], np.cumsum(np.bincount(row_of_slot))])
    filled = int(self.sizes.sum()) / max(1, len(self) * seq_len)
    self.waste = 1 - filled

  def __len__(self) -> int:
    """Returns the number of rows."""
    return len(self._starts) - 1

  def drawn(self, seed: int, epoch: int) -> np.ndarray:
    """Returns an arrangement: the piece in each slot, int64 [pieces]."""
    rng = np.random.default_rng((seed, epoch))
    return np.lexsort((rng.random(len(self.sizes)), -self.sizes))

  def in_order(self) -> np.ndarray:
    """Returns the arrangement in which no seed has a say."""
    return self._in_order

  def by_first(self, arrangement: np.ndarray) -> np.ndarray:
    """Returns the numbers of all rows in the order of their first pieces."""
    pieces = arrangement[self._slots]
    return np.argsort(np.minimum.reduceat(pieces, self._starts[:-1]))

  def pieces(self, arrangement: np.ndarray, row: int) -> np.ndarray:
    """Returns the pieces of a row, in the order of the split."""
    slots = self._slots[self._starts[row] : self._starts[row + 1]]
    return np.sort(arrangement[slots])


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
  """Returns the row of each piece, int64, by best-fit decreasing.

  Pieces of one length and rows of one room are handled together, so the time
  grows with how many lengths there are, and hardly with the pieces.

  Args:
    sizes: Lengths from 1 to `capacity`, descending.
    capacity: What a row holds.
  """
  rows = np.zeros(len(sizes), np.int64)
  opened = 0
  with_room: dict[int, list[int]] = {}  # the rows that have so much room
  rooms: list[int] = []  # its keys, ascending

  def add(room: int, numbers: list[int]) -> None:
    if room and room not in with_room:
      bisect.insort(rooms, room)
    if room:
      with_room.setdefault(room, []).extend(numbers)

  changes = (np.flatnonzero(np.diff(sizes)) + 1).tolist()
  for begin, end in itertools.pairwise([0, *changes, len(sizes)]):
    while begin < end:
      size = int(sizes[begin])
      place = bisect.bisect_left(rooms, size)
      if place == len(rooms):
        count = -(-(end - begin) // (capacity // size))
        add(capacity, list(range(opened, opened + count)))
        opened += count
      room = rooms[place]
      each = min(room // size, end - begin)
      there = with_room[room]
      taken = there[-((end - begin) // each) :]
      del there[len(there) - len(taken) :]
      if not there:
        del with_room[room], rooms[place]
      stop = begin + len(taken) * each
      rows[begin:stop] = np.repeat(taken, each)
      add(room - each * size, taken)
      begin = stop
  return rows
