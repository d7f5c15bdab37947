"""A split as one long stream of token ids, and sequences of it.

The stream is `eos doc eos doc ... eos`, or, where the documents are the pieces
of one text, that text.
"""

import collections
import functools
import hashlib
import threading
from collections.abc import Callable
from typing import Self

import numpy as np
from ml_collections import ConfigDict

from moe_jax.data import sources
from moe_jax.data.lengths import document_lengths
from moe_jax.data.packing import Packing
from moe_jax.data.sources import Documents
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError

# 'token_ids' and 'targets' int32 [L], 'padding_mask' bool [L], True at tokens,
# and in a contiguous order 'segment_start' bool []. Packed ones have int32 [L]
# 'segment_ids', 1, 2, ... and 0 at padding, and 'positions', from 0 on in every
# segment.
TokenSequence = dict[str, np.ndarray]

# Encoded documents that a split keeps at hand; python_stdlib fits whole.
_CACHE_BYTES = 64 * 2**20
# How many documents a fingerprint reads, at the most, and how large.
_SAMPLED, _SAMPLED_BYTES = 64, 2**20


class TokenSequences:
  """The sequences of a split, by number; safe to read from several threads.

  Every token of the stream but the first is a target exactly once. The last
  sequence is filled up with zeros, where its mask is False.

  Attributes:
    split: The split, in TFDS's notation.
    seq_len: L.
    num_tokens: The targets in all sequences.
    num_stream_tokens: The tokens of the stream; one more.
    num_bytes: The UTF-8 bytes of the text, without what separates documents.
    lengths: The tokens of every document, int64 [documents].
  """

  def __init__(
    self, documents: Documents, tokenizer: Tokenizer, seq_len: int
  ) -> None:
    """Measures the documents; UserError if one of them is not UTF-8."""
    measured = document_lengths(documents, tokenizer)
    self._documents = documents
    self._measured = measured
    self._tokenizer = tokenizer
    self.split = documents.split
    self.seq_len = seq_len
    # Piece d of the stream is eos and document d; one more eos ends it. In one
    # text it is document d.
    self._separated = not documents.single_document
    sizes = measured[:, 0] + self._separated
    self._starts = np.concatenate([[0], np.cumsum(sizes)])
    self._pieces = _Cache(self._make_piece, _CACHE_BYTES)
    self.num_stream_tokens = int(self._starts[-1]) + self._separated
    self.num_tokens = self.num_stream_tokens - 1
    self.num_bytes = int(measured[:, 1].sum())
    self.lengths = measured[:, 0]

  @classmethod
  def open(cls, data: ConfigDict, split: str, tokenizer: Tokenizer) -> Self:
    """Returns the sequences of a split of the data set that a config names.

    Args:
      data: The section `config.data`.
      split: As in `sources.open_documents`, which says what is raised.
      tokenizer: That of the config.
    """
    return cls(sources.open_documents(data, split), tokenizer, data.seq_len)

  @functools.cached_property
  def packing(self) -> Packing:
    """How the documents share rows of L; the pieces of one text are one.

    A document takes a position more than it has tokens: its inputs begin with
    eos and its targets end with it, so that the targets are those of the
    stream, and its positions those of the stream too.
    """
    one = np.array([self.num_tokens])
    return Packing(self.lengths + 1 if self._separated else one, self.seq_len)

  def fingerprint(self) -> dict[str, str | int]:
    """Returns what tells this stream from others, as JSON can hold it.

    `content` is a hash of the lengths of all documents, and of the text of some
    that are spread evenly and not long: what can be had without reading all.
    """
    documents = self._documents
    content = hashlib.blake2b(self._measured.tobytes(), digest_size=8)
    count = len(documents)
    for d in sorted({i * count // _SAMPLED for i in range(_SAMPLED)}):
      if self._measured[d, 1] <= _SAMPLED_BYTES:
        content.update(documents[d].encode(errors='surrogateescape'))
    return {
      'name': documents.full_name,
      'split': documents.split,
      'documents': count,
      'tokens': self.num_stream_tokens,
      'bytes': self.num_bytes,
      'tokenizer': self._tokenizer.name,
      'content': content.hexdigest(),
    }

  def __len__(self) -> int:
    return -(-self.num_tokens // self.seq_len)

  def __getitem__(self, i: int) -> TokenSequence:
    """Returns inputs, targets int32 [L] and mask bool [L] of sequence `i`."""
    if not 0 <= i < len(self):
      raise IndexError(f'sequence {i} of {len(self)}')
    return self.at(i)

  def at(self, i: int) -> TokenSequence:
    """Returns sequence `i`; past the last one it is all padding."""
    return self.read(i * self.seq_len, self.seq_len)

  def read(self, begin: int, count: int) -> TokenSequence:
    """Returns a sequence that begins anywhere in the stream.

    Args:
      begin: The number of the first input.
      count: The number of targets; fewer at the end of the stream. The rest of
        L is padding.
    """
    count = max(0, min(count, self.num_tokens - begin))
    token_ids, targets = np.zeros((2, self.seq_len), np.int32)
    if count:
      tokens = self._tokens(begin, begin + count + 1)
      token_ids[:count], targets[:count] = tokens[:-1], tokens[1:]
    padding_mask = np.arange(self.seq_len) < count
    return {
      'token_ids': token_ids,
      'targets': targets,
      'padding_mask': padding_mask,
    }

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
    """Returns piece `d`, in the smallest type that holds its ids.

    Raises:
      UserError: The document is not as long as it was when it was measured.
    """
    ids = [np.array([self._tokenizer.eos_id])] if self._separated else []
    if d < len(self._documents):
      ids.append(self._tokenizer.encode(self._documents[d]))
    piece = np.concatenate(ids)
    if d < len(self._documents):
      self._check_length(d, len(piece))
    return piece.astype(np.min_scalar_type(self._tokenizer.vocab_size - 1))

  def _check_length(self, d: int, found: int) -> None:
    """Refuses other data than was measured: all positions would be shifted."""
    expected = int(self._starts[d + 1] - self._starts[d])
    if found != expected:
      raise UserError(
        f'document {d} of {self._documents.full_name}, split'
        f' {self._documents.split!r}, has {found - self._separated} tokens, and'
        f' {expected - self._separated} when it was measured; remove the files'
        f' lengths-* in {self._documents.folder}, and it is measured anew'
      )


class _Cache:
  """Keeps the arrays read last, up to a number of bytes and at least one."""

  def __init__(self, make: Callable[[int], np.ndarray], max_bytes: int) -> None:
    self._make = make
    self._max_bytes = max_bytes
    self._bytes = 0
    self._kept: collections.OrderedDict[int, np.ndarray] = (
      collections.OrderedDict()
    )
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
