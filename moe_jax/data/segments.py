"""Rows that go on where they stopped: the order for models with a memory.

The stream of a split is cut into as many equal parts as a batch has rows. Step
s reads the next segment of every part, so a row's memory of the segment before
is right for this one. Where it is not, the batch's `segment_start` is True.
"""

import bisect
import threading

import numpy as np

from moe_jax import errors
from moe_jax.data.windows import Window, Windows


class Segments:
  """The segments of a run's steps, a function of (seed, step) on the stream.

  An epoch ends where not every row has a whole segment left, and the next one
  begins at an offset below the length of a segment, so that it cuts the text
  elsewhere (as released). The first begins at 0.
  """

  def __init__(self, windows: Windows, num_rows: int, seed: int) -> None:
    """Cuts the stream; what does not fill the rows is left out.

    Args:
      windows: the split.
      num_rows: of a batch, over all processes.
      seed: of the offsets.

    Raises:
      UserError: the rows are shorter than a segment.
    """
    self._windows = windows
    self._seed = seed
    self._row_tokens = windows.num_stream_tokens // num_rows
    if self._row_tokens <= windows.seq_len:
      raise errors.UserError(
        f"data.order = 'contiguous': train.batch_size = {num_rows} cuts the"
        f' {windows.num_stream_tokens} tokens into rows of {self._row_tokens},'
        f' but data.seq_len = {windows.seq_len} needs {windows.seq_len + 1};'
        ' lower one of them'
      )
    self._lock = threading.Lock()
    self._first_steps = [0]  # of every epoch known so far, and of the next
    self._offsets: list[int] = []

  def at(self, step: int, row: int) -> Window:
    """Returns the window of a row at a step, and whether a row starts anew."""
    nth, offset = self._locate(step)
    length = self._windows.seq_len
    begin = row * self._row_tokens + offset + nth * length
    window = self._windows.read(begin, length)
    return window | {'segment_start': np.bool_(nth == 0)}

  def _locate(self, step: int) -> tuple[int, int]:
    """The number of a step in its epoch, and the epoch's offset."""
    with self._lock:
      while self._first_steps[-1] <= step:
        self._add_epoch()
      epoch = bisect.bisect_right(self._first_steps, step) - 1
      return step - self._first_steps[epoch], self._offsets[epoch]

  def _add_epoch(self) -> None:
    epoch, length = len(self._offsets), self._windows.seq_len
    rng = np.random.default_rng((self._seed, epoch))
    # One segment, and the token after it, fit whatever the offset.
    bound = min(length, self._row_tokens - length)
    offset = int(rng.integers(bound)) if epoch else 0
    steps = (self._row_tokens - 1 - offset) // length
    self._offsets.append(offset)
    self._first_steps.append(self._first_steps[-1] + steps)


class WholeRows:
  """A split in order, once: every token is the target of one row and step."""

  def __init__(self, windows: Windows, num_rows: int) -> None:
    self._windows = windows
    self._row_tokens = -(-windows.num_tokens // num_rows)

  def __len__(self) -> int:
    """Returns the number of steps."""
    return -(-self._row_tokens // self._windows.seq_len)

  def at(self, step: int, row: int) -> Window:
    """Returns the window of a row at a step, masked after the row's end."""
    begin = step * self._windows.seq_len
    left = self._row_tokens - begin
    count = min(self._windows.seq_len, left)
    window = self._windows.read(row * self._row_tokens + begin, count)
    return window | {'segment_start': np.bool_(step == 0)}
