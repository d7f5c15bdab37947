"""A split as one long stream of token ids, and sequences of it.

The stream is `eos doc eos doc ... eos`, or, where the documents are the pieces
of one text, that text.
"""

import copy
import functools
import hashlib
from typing import Self

import numpy as np
from ml_collections import ConfigDict

from moe_jax.data import instructions, sources
from moe_jax.data.packing import Packing
from moe_jax.data.sources import Documents
from moe_jax.data.token_cache import TokenCache
from moe_jax.data.tokenizers import Tokenizer

# 'token_ids' and 'targets' int32 [L], 'padding_mask' bool [L], True at tokens,
# and in a contiguous order 'segment_start' bool []. Packed ones have int32 [L]
# 'segment_ids', 1, 2, ... and 0 at padding, and 'positions', from 0 on in every
# segment. Those of examples have 'target_mask' bool [L], True at the tokens to
# be predicted, those of a mixture the number of their `source`, int32 [].
TokenSequence = dict[str, np.ndarray]

# How many documents a fingerprint reads, at the most, and how large.
_SAMPLED, _SAMPLED_BYTES = 64, 2**20
_DIGESTED_TOKENS = 2**20  # at once
_KEPT_DOCUMENTS = 256  # of which classes are at hand


class TokenSequences:
  """The sequences of a split, by number; safe to read from several threads.

  Every token of the stream but the first is a target exactly once. The last
  sequence is filled up with zeros, where its mask is False.

  Attributes:
    split: The split, in TFDS's notation.
    seq_len: L.
    num_tokens: The tokens of all sequences.
    num_targets: Those that are to be predicted; of examples, the responses and
      what ends each of them.
    num_stream_tokens: The tokens of the stream; one more.
    num_bytes: The UTF-8 bytes of the text, without what separates documents.
    num_target_bytes: Those that are to be predicted.
    lengths: The tokens of every document, int64 [documents].
    masked: Whether the documents are examples.
  """

  def __init__(
    self, documents: Documents, tokenizer: Tokenizer, seq_len: int
  ) -> None:
    """Opens the token ids of the documents, which may encode them first.

    Raises:
      UserError, RetryableError: As `TokenCache.open`.
    """
    self._documents = documents
    self._tokenizer = tokenizer
    self._cache = TokenCache.open(documents, tokenizer)
    self._tokens = self._cache.read  # tokens [begin, end) of the stream
    self._separated = self._cache.separated
    self.split = documents.split
    self.seq_len = seq_len
    self.num_stream_tokens = len(self._cache)
    self.num_tokens = self.num_stream_tokens - 1
    self.lengths = self._cache.lengths[:, 0]
    self.num_bytes = int(self._cache.lengths[:, 1].sum())
    self.num_targets = self.num_tokens
    self.num_target_bytes = self.num_bytes
    self.masked = self._cache.masked
    if self.masked:
      of_text, self.num_target_bytes = (
        self._cache.lengths[:, 2:].sum(0).tolist()
      )
      self.num_targets = of_text + len(documents)  # an eos behind each

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
    content = hashlib.blake2b(self._cache.lengths.tobytes(), digest_size=8)
    count = len(documents)
    for d in sorted({i * count // _SAMPLED for i in range(_SAMPLED)}):
      if self._cache.lengths[d, 1] <= _SAMPLED_BYTES:
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

  def digest(self) -> str:
    """Returns the BLAKE2b of the whole stream, 32 hexadecimal digits.

    It is that of the ids as little-endian int32, whatever they are kept as; of
    examples, of twice the id, and 1 more at what is to be predicted. All of the
    stream is read, and held to its checksums.
    """
    found = hashlib.blake2b(digest_size=16)
    for begin in range(0, self.num_stream_tokens, _DIGESTED_TOKENS):
      end = min(begin + _DIGESTED_TOKENS, self.num_stream_tokens)
      tokens = self._tokens(begin, end).astype('<i4')
      if self.masked:
        tokens = 2 * tokens + self._cache.targets(begin, end)
      found.update(tokens.astype('<i4').data)
    return found.hexdigest()

  def of_classes(self, classes: Tokenizer) -> Self:
    """Returns the same sequences with the classes of tokens for their ids.

    A document's are made when it is read: nothing is kept of them on disk, and
    the documents that are not read cost nothing.

    Args:
      classes: What makes as many classes of a document as it has tokens.
    """
    made = copy.copy(self)
    made._tokens = _Classes(self._documents, classes, self._cache).read
    return made

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
    sequence = {
      'token_ids': token_ids,
      'targets': targets,
      'padding_mask': padding_mask,
    }
    if self.masked:
      target_mask = sequence['target_mask'] = np.zeros(self.seq_len, bool)
      if count:
        end = begin + count + 1
        target_mask[:count] = self._cache.targets(begin + 1, end)
    return sequence


class _Classes:
  """The classes of a stream's tokens, made of documents as they are read."""

  def __init__(
    self, documents: Documents, classes: Tokenizer, cache: TokenCache
  ) -> None:
    self._documents = documents
    self._classes = classes
    self._cache = cache
    self._of = functools.lru_cache(_KEPT_DOCUMENTS)(self._make)

  def read(self, begin: int, end: int) -> np.ndarray:
    """Returns the classes of tokens [begin, end) of the stream."""
    starts = self._cache.starts
    d = int(np.searchsorted(starts, begin, side='right')) - 1
    parts = []
    while begin < end:
      parts.append(self._of(d)[begin - starts[d] : end - starts[d]])
      begin += len(parts[-1])
      d += 1
    return np.concatenate(parts)

  def _make(self, d: int) -> np.ndarray:
    """Returns those of what separates documents, and of document `d`."""
    parts = [np.array([self._classes.eos_id])] if self._cache.separated else []
    if d < len(self._documents):
      [text] = self._documents.parts(d, d + 1)
      encode = self._classes.encode, self._classes.eos_id
      parts.append(instructions.encode(text, *encode)[0])
    dtype = np.min_scalar_type(self._classes.vocab_size - 1)
    return np.concatenate(parts).astype(dtype)
