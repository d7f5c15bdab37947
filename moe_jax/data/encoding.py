"""Documents to files of token ids, by all processes that want them.

A process encodes the files that are missing and that no other one has locked.
Where much is left to do, a process of each host starts others that help
(`helpers.py`).
"""

import contextlib
import dataclasses
import functools
import glob
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from typing import Self

import numpy as np

from moe_jax import errors, files, strict_json
from moe_jax.data.helpers import Helpers, Locks
from moe_jax.data.instructions import Part as TextPart
from moe_jax.data.instructions import encode
from moe_jax.data.parts import Part, PartWriter, writing
from moe_jax.data.progress import Progress
from moe_jax.data.sources import Documents
from moe_jax.data.tokenizers import Tokenizer

_FORMAT = 1
# About how much text a file holds, and how many files a split has at the most:
# each is a file descriptor.
_PART_BYTES, _MOST_PARTS = 2**24, 128
_SAMPLED = 8
# How much text is read at once, where documents are small.
_READ_BYTES, _READ_DOCUMENTS = 2**20, 1024
_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which documents go into which file.

  Attributes:
    documents: The number of documents.
    vocab_size: Every id is below it.
    eos_id: What stands between documents; None for nothing.
    bounds: File k has documents [bounds[k], bounds[k + 1]).
    format: The version of all that is written.
  """

  documents: int
  vocab_size: int
  eos_id: int | None
  bounds: list[int]
  format: int = _FORMAT

  @classmethod
  def of(
    cls,
    folder: str,
    documents: Documents,
    vocab_size: int,
    eos_id: int | None,
  ) -> Self:
    """Returns the plan of a folder; without one that fits, it is made.

    It follows from the documents, so that of several processes that make it at
    once any may be the last.
    """
    path = os.path.join(folder, 'plan.json')
    with contextlib.suppress(OSError, ValueError, TypeError):
      found = cls(**files.read_json(path))
      if found == cls(len(documents), vocab_size, eos_id, found.bounds):
        return found
    bounds = _bounds(documents)
    made = cls(len(documents), vocab_size, eos_id, bounds)
    with writing(path):
      os.makedirs(folder, exist_ok=True)
      aside = f'{path}.{os.getpid()}-{uuid.uuid4().hex}'
      with open(aside, 'w', encoding='utf-8') as file:
        file.write(made.json())
      os.replace(aside, path)
    return made

  def json(self) -> str:
    """Returns what is kept of it."""
    return strict_json.dumps(dataclasses.asdict(self))

  @functools.cached_property
  def stamp(self) -> int:
    """What its files are known by."""
    return zlib.crc32(self.json().encode())


@dataclasses.dataclass(frozen=True)
class Encoding:
  """What the files of a split are made of.

  Attributes:
    folder: Where they lie.
    documents: The split.
    tokenizer: What makes ids of it.
    plan: That of the folder.
  """

  folder: str
  documents: Documents
  tokenizer: Tokenizer
  plan: Plan

  def parts(self, with_helpers: bool = True) -> list[Part]:
    """Returns all files; those that are missing or damaged are made.

    Args:
      with_helpers: Whether other processes are started where it is worth it.

    Raises:
      UserError: A document is not UTF-8, or the tokenizer makes an id that it
        says it does not have.
      RetryableError: The disk is full.
    """
    found = {k: part for k in self._numbers if (part := self._load(k))}
    if len(found) < len(self._numbers):
      self._make_missing(found, with_helpers)
      for left in glob.glob(f'{glob.escape(self.folder)}/*.ids.*'):
        with contextlib.suppress(OSError):  # of a process that was killed
          os.unlink(left)
    return [found[k] for k in self._numbers]

  @property
  def _numbers(self) -> range:
    return range(len(self.plan.bounds) - 1)

  def _make_missing(self, found: dict[int, Part], with_helpers: bool) -> None:
    """Adds the files that are not found, whoever makes them."""
    documents = self.documents
    progress = Progress(
      f'the token ids of {documents.full_name}, split {documents.split}',
      len(documents),
      self._count(found),
    )
    with Locks(self.folder) as locks, Helpers(self, locks) as helpers:
      while missing := [k for k in self._numbers if k not in found]:
        before = len(found)
        for k in missing:
          began = time.monotonic()
          with locks.held(k) as mine:
            part = self._load(k)
            if part is None and mine:
              part = self._make(k, progress, self._count(found))
          if part is not None:
            found[k] = part
          if mine and with_helpers:
            left = len(self._numbers) - len(found)
            helpers.start((time.monotonic() - began) * left, left)
        if len(found) == before:
          time.sleep(_POLL_SECONDS)
        progress.tell(self._count(found))

  def _count(self, found: dict[int, Part]) -> int:
    """Returns the documents of the files that are there."""
    return sum(len(part.lengths) for part in found.values())

  def _path(self, k: int) -> str:
    return os.path.join(self.folder, f'{k:04}.ids')

  def _load(self, k: int) -> Part | None:
    """Returns file k; None if it is not there, or not whole."""
    begin, end = self.plan.bounds[k : k + 2]
    try:
      part = Part(self._path(k), self.plan.stamp)
    except (OSError, ValueError):
      return None
    return part if len(part.lengths) == end - begin else None

  def _make(self, k: int, progress: Progress, done: int) -> Part:
    """Encodes the documents of file k."""
    begin, end = self.plan.bounds[k : k + 2]
    masked, vocab_size = self.documents.masked, self.plan.vocab_size
    eos = np.array([] if self.plan.eos_id is None else [self.plan.eos_id])
    eos = 2 * eos + 1 if masked else eos  # it ends a response
    writer = PartWriter(
      self._path(k),
      self.plan.stamp,
      2 * vocab_size if masked else vocab_size,
      columns=4 if masked else 2,
    )
    with writer:
      for i, parts in enumerate(_texts(self.documents, begin, end)):
        progress.tell(done + i)
        ids, sizes = self._encoded(parts)
        writer.ids(eos)
        writer.ids(ids)
        writer.document(*sizes)
      if end == self.plan.documents:
        writer.ids(eos)
    return Part(self._path(k), self.plan.stamp)

  def _encoded(self, parts: list[TextPart]) -> tuple[np.ndarray, list[int]]:
    """Returns what is kept of a document, and its sizes; see `TokenCache`."""
    sizes = [len(text.encode(errors='surrogateescape')) for text, _ in parts]
    if not self.documents.masked:
      ids = self.tokenizer.encode(parts[0][0])
      _check_ids(ids, self.tokenizer)
      return ids, [len(ids), *sizes]
    ids, targets = encode(parts, self.tokenizer.encode, self.tokenizer.eos_id)
    _check_ids(ids, self.tokenizer)
    predicted = sum(
      size for size, (_, response) in zip(sizes, parts, strict=True) if response
    )
    counts = [len(ids), sum(sizes), int(targets.sum()), predicted]
    return 2 * ids + targets, counts


def _bounds(documents: Documents) -> list[int]:
  """Returns the bounds of a plan, by the size of some documents."""
  count = len(documents)
  sample = sorted({i * count // _SAMPLED for i in range(_SAMPLED)})
  size = sum(len(documents[d]) for d in sample) * count // max(len(sample), 1)
  parts = min(-(-size // _PART_BYTES), _MOST_PARTS, count)
  return [k * count // max(parts, 1) for k in range(max(parts, 1) + 1)]


def _texts(
  documents: Documents, begin: int, end: int
) -> Iterator[list[TextPart]]:
  """Yields documents [begin, end), small ones read many at a time."""
  count = 1
  while begin < end:
    found = documents.parts(begin, min(begin + count, end))
    yield from found
    begin += len(found)
    few = sum(len(text) for parts in found for text, _ in parts) < _READ_BYTES
    count = min(2 * count, _READ_DOCUMENTS) if few else max(1, count // 2)


def _check_ids(ids: np.ndarray, tokenizer: Tokenizer) -> None:
  """Refuses ids that the model would not have, and that would wrap around."""
  if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
    raise errors.UserError(
      f'data.tokenizer = {tokenizer.name!r} makes ids from {ids.min()} to'
      f' {ids.max()}, and says that it has {tokenizer.vocab_size}: 0 to'
      f' {tokenizer.vocab_size - 1}; mend one of them'
    )
