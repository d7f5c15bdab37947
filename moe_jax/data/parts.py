"""Files of token ids: a stretch of a split's stream, with its documents' sizes.

A file is, one behind the other and all little-endian: the ids, in the smallest
type that holds them; zeros up to a multiple of 8 bytes; int64 [documents, 2 or
4], the sizes of each document; a CRC-32 of each block of 64 KiB of ids; and a
trailer, which has the sizes of these, the stamp of the plan that the file is
of, and a CRC-32 of all that are not ids. So a file that was cut is none, and a
block is verified when it is read first.
"""

import contextlib
import errno
import os
import struct
import uuid
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np

from moe_jax import disk, errors

_BLOCK = 2**16
_BUFFER = 2**20
_MAGIC = b'moe-ids2'
_TRAILER = struct.Struct('<8sQQIIII')
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class ReadOnlyError(Exception):
  """A folder may only be read."""


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
  """Tells what keeps a file from being written.

  Raises:
    ReadOnlyError: The folder may only be read.
    RetryableError: The disk is full, or does not answer.
    UserError: It cannot be written for another reason.
  """
  try:
    yield
  except OSError as error:
    if error.errno in _READ_ONLY:
      raise ReadOnlyError(path) from error
    remedy = 'choose another --config.data.dir'
    raise disk.refused(path, error, remedy, 'the token ids') from error


class Part:
  """The ids of a file, mapped into memory; safe to read from several threads.

  Attributes:
    lengths: The sizes of its documents, int64 [documents, columns].
  """

  def __init__(self, path: str, stamp: int) -> None:
    """Maps a file.

    Args:
      path: The file.
      stamp: The CRC-32 of the plan that it has to be of.

    Raises:
      OSError: It cannot be read.
      ValueError: It is not whole, or of another plan.
    """
    self._path = path
    content = np.memmap(path, np.uint8, 'r')
    trailer = content[-_TRAILER.size :].tobytes()
    if len(trailer) < _TRAILER.size:
      raise ValueError(f'{path} is cut')
    magic, ids, documents, width, columns, found, checksum = _TRAILER.unpack(
      trailer
    )
    if magic != _MAGIC or found != stamp or width not in (1, 2, 4):
      raise ValueError(f'{path} is of another plan')
    begin = -(-ids * width // 8) * 8
    middle = begin + 8 * columns * documents
    end = middle + 4 * -(-ids * width // _BLOCK)
    if end + _TRAILER.size != len(content):
      raise ValueError(f'{path} is cut')
    if zlib.crc32(content[begin:-4].data) != checksum:
      raise ValueError(f'{path} is damaged')
    lengths = content[begin:middle].view('<i8')
    self.lengths = lengths.reshape(documents, columns)
    self._checksums = content[middle:end].view('<u4')
    self._bytes = content[: ids * width]
    # What `memmap` does beside slicing costs more than the slicing.
    self._ids = np.asarray(self._bytes.view(f'<u{width}'))
    self._verified = bytearray(len(self._checksums))

  def __len__(self) -> int:
    return len(self._ids)

  def read(self, begin: int, end: int) -> np.ndarray:
    """Returns ids [begin, end) as they lie in the file, an unsigned type.

    Raises:
      UserError: They are not what was written.
    """
    width = self._ids.itemsize
    for block in range(begin * width // _BLOCK, -(-end * width // _BLOCK)):
      if not self._verified[block]:
        self._verify(block)
    return self._ids[begin:end]

  def _verify(self, block: int) -> None:
    content = self._bytes[block * _BLOCK : (block + 1) * _BLOCK]
    if zlib.crc32(content.data) != self._checksums[block]:
      raise errors.UserError(
        f'{self._path} is damaged: its block {block} is not what was written;'
        ' remove that file, and it is made anew'
      )
    self._verified[block] = 1


class PartWriter:
  """Writes a file aside, which has its name once it is whole."""

  def __init__(
    self, path: str, stamp: int, vocab_size: int, columns: int = 2
  ) -> None:
    """Prepares to write; see `Part` for the arguments.

    Args:
      path: The file.
      stamp: The CRC-32 of its plan.
      vocab_size: Every id is below it.
      columns: The sizes of a document.
    """
    self._path = path
    self._aside = f'{path}.{os.getpid()}-{uuid.uuid4().hex}'
    self._stamp = stamp
    size = np.min_scalar_type(max(vocab_size - 1, 0)).itemsize
    self._dtype = np.dtype(f'<u{size}')
    self._ids = 0
    self._waiting: list[bytes] = []
    self._num_waiting = 0
    self._columns = columns
    self._lengths: list[tuple[int, ...]] = []
    self._checksums: list[int] = []

  def __enter__(self) -> Self:
    with writing(self._path):
      self._file = open(self._aside, 'wb')
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    try:
      if kind is None:
        self._end()
    finally:
      with contextlib.suppress(OSError):
        self._file.close()
      with contextlib.suppress(OSError):
        os.unlink(self._aside)

  def ids(self, ids: np.ndarray) -> None:
    """Writes ids."""
    self._ids += len(ids)
    for i in range(0, len(ids), _BUFFER):
      content = ids[i : i + _BUFFER].astype(self._dtype).tobytes()
      self._waiting.append(content)
      self._num_waiting += len(content)
      if self._num_waiting >= _BUFFER:
        self._flush(_BLOCK)

  def document(self, *sizes: int) -> None:
    """Notes the sizes of a document, whose ids are written beside."""
    self._lengths.append(sizes)

  def _flush(self, multiple: int) -> None:
    """Writes what waits, up to a multiple of bytes."""
    content = memoryview(b''.join(self._waiting))
    size = len(content) - len(content) % multiple
    self._checksums += [
      zlib.crc32(content[i : min(i + _BLOCK, size)])
      for i in range(0, size, _BLOCK)
    ]
    with writing(self._path):
      self._file.write(content[:size])
    self._waiting = [bytes(content[size:])]
    self._num_waiting = len(content) - size

  def _end(self) -> None:
    """Writes the rest and gives the file its name."""
    self._flush(1)
    width = self._dtype.itemsize
    lengths = np.array(self._lengths, '<i8').reshape(-1, self._columns)
    tables = lengths.tobytes() + np.array(self._checksums, '<u4').tobytes()
    sizes = self._ids, len(lengths), width, self._columns, self._stamp
    tables += _TRAILER.pack(_MAGIC, *sizes, 0)[:-4]
    checksum = struct.pack('<I', zlib.crc32(tables))
    with writing(self._path):
      self._file.write(bytes(-self._ids * width % 8) + tables + checksum)
      self._file.flush()
      os.fsync(self._file.fileno())
      self._file.close()
      try:
        os.replace(self._aside, self._path)
      except FileNotFoundError:  # another process was done first, and tidied up
        if not os.path.exists(self._path):
          raise
