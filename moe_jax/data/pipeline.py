"""Batches of token windows: from documents to what a step reads.

A split is one long stream, `eos doc eos doc ... eos`, cut into windows of L
tokens and the one that follows. The batches are a function of (seed, step) on
the whole split. A process makes only the rows that it is asked for, so how
many processes there are changes nothing, and the position that a checkpoint
keeps is the number of steps read.
"""

import collections
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import grain
import numpy as np

from moe_jax.data import token_index
from moe_jax.data.corpora import Documents
from moe_jax.data.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]

# Encoded documents that a split keeps at hand; python_stdlib fits whole.
_CACHE_BYTES = 64 * 2**20


class Windows:
  """The windows of a split, by number; safe to read from several threads.

  Every token of the stream but the first is a target exactly once. The last
  window is filled up with zeros, where its mask is False.

  Attributes:
    num_tokens: targets in all windows.
    num_bytes: UTF-8 bytes of the text, without what separates documents.
  """

  def __init__(
    self, documents: Documents, tokenizer: Tokenizer, seq_len: int
  ) -> None:
    """Measures the documents; UserError if one of them is not UTF-8."""
    lengths = token_index.lengths(documents, tokenizer)
    self._documents = documents
    self._tokenizer = tokenizer
    self._seq_len = seq_len
    # Piece d of the stream is eos and document d; one more eos ends it.
    self._starts = np.concatenate([[0], np.cumsum(lengths[:, 0] + 1)])
    self._pieces = _Cache(self._make_piece, _CACHE_BYTES)
    self.num_tokens = int(self._starts[-1])
    self.num_bytes = int(lengths[:, 1].sum())

  def __len__(self) -> int:
    return -(-self.num_tokens // self._seq_len)

  def __getitem__(self, i: int) -> Batch:
    """Returns inputs, targets int32 [L] and mask bool [L] of window `i`."""
    if not 0 <= i < len(self):
      raise IndexError(f'window {i} of {len(self)}')
    return self.at(i)

  def at(self, i: int) -> Batch:
    """Returns window `i`; past the last one it is all padding."""
    begin = i * self._seq_len
    count = max(0, min(self._seq_len, self.num_tokens - begin))
    inputs, targets = np.zeros((2, self._seq_len), np.int32)
    if count:
      tokens = self._tokens(begin, begin + count + 1)
      inputs[:count], targets[:count] = tokens[:-1], tokens[1:]
    mask = np.arange(self._seq_len) < count
    return {'inputs': inputs, 'targets': targets, 'mask': mask}

  def _tokens(self, begin: int, end: int) -> np.ndarray:
    """Returns tokens [begin, end) of the stream."""
    d = int(np.searchsorted(self._starts, begin, side='right')) - 1
    parts = []
    while begin < end:
      start = self._starts[d]
      parts.append(self._pieces[d][begin - start : end - start])
      begin += len(parts[-1])
      d += 1
    return np.concatenate(parts)

  def _make_piece(self, d: int) -> np.ndarray:
    """Returns eos and document `d`, in the smallest type that holds its ids."""
    ids = [np.array([self._tokenizer.eos_id])]
    if d < len(self._documents):
      ids.append(self._tokenizer.encode(self._documents[d]))
    dtype = np.min_scalar_type(self._tokenizer.vocab_size - 1)
    return np.concatenate(ids).astype(dtype)


class _Cache:
  """Keeps the arrays read last, up to a number of bytes and at least one."""

  def __init__(self, make: Callable[[int], np.ndarray], max_bytes: int) -> None:
    self._make = make
    self._max_bytes = max_bytes
    self._bytes = 0
    self._kept = collections.OrderedDict()
    self._lock = threading.Lock()

  def __getitem__(self, key: int) -> np.ndarray:
    with self._lock:
      if key in self._kept:
        self._kept.move_to_end(key)
        return self._kept[key]
    # Outside the lock: other threads go on while this one reads.
    array = self._make(key)
    with self._lock:
      if key not in self._kept:
        self._kept[key] = array
        self._bytes += array.nbytes
      while self._bytes > self._max_bytes and len(self._kept) > 1:
        self._bytes -= self._kept.popitem(last=False)[1].nbytes
    return array


class TrainStream:
  """The batches of a run, from a step on, for ever."""

  def __init__(self, batches: grain.DatasetIterator, step: int) -> None:
    self._batches = batches
    self._step = step

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> Batch:
    """Returns inputs, targets int32 [rows, L] and mask bool [rows, L]."""
    batch = next(self._batches)
    self._step += 1
    return batch

  def state(self) -> dict[str, int]:
    """Returns the position: `step`, the step whose batch is read next."""
    return {'step': self._step}

  def close(self) -> None:
    """Ends the threads that read ahead."""
    self._batches.close()


def train_batches(
  windows: Windows,
  *,
  batch_size: int,
  rows: Sequence[int],
  seed: int,
  start: int,
  threads: int,
) -> TrainStream:
  """Returns this process's part of the batches from step `start` on.

  Step s holds elements [s * batch_size, (s + 1) * batch_size) of the windows
  shuffled anew in every epoch; an epoch may end inside a batch.

  Args:
    windows: the split.
    batch_size: windows per step, over all processes.
    rows: the rows of the global batch that this process holds, in its order.
    seed: of the shuffle; only its lowest 32 bits count.
    start: the first step to read, 0 or what `state()` said.
    threads: that read ahead; 0 reads when a batch is asked for.
  """
  rows = [int(row) for row in rows]
  stream = grain.MapDataset.source(windows).shuffle(seed % 2**32).repeat()

  def read(step: int) -> Batch:
    return _stack([stream[step * batch_size + row] for row in rows])

  # The elements are whole steps, so one thread hand-over costs one step's rows.
  steps = grain.MapDataset.range(start, sys.maxsize // batch_size).map(read)
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=2 * threads
  )
  return TrainStream(iter(steps.to_iter_dataset(options)), start)


def num_batches(windows: Windows, batch_size: int) -> int:
  """Returns how many batches hold all windows once."""
  return -(-len(windows) // batch_size)


def eval_batches(
  windows: Windows, *, batch_size: int, rows: Sequence[int]
) -> Iterator[Batch]:
  """Yields this process's rows of the whole split, in order, once.

  Every process yields the same number of batches; the last one is filled up
  with rows whose mask is all False. Arguments as in `train_batches`.
  """
  for i in range(num_batches(windows, batch_size)):
    yield _stack([windows.at(i * batch_size + row) for row in rows])


def _stack(parts: list[Batch]) -> Batch:
  """Returns the windows as the rows of one batch."""
  return {key: np.stack([part[key] for part in parts]) for key in parts[0]}
