"""Text to token ids and back."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

from moe_jax import errors
from moe_jax.data import sources, vocabulary


class Tokenizer(Protocol):
  """What the pipeline asks of a tokenizer.

  Attributes:
    name: names the files that depend on it, so two tokenizers that encode
      differently have different names.
    vocab_size: every id is in [0, vocab_size).
    eos_id: the id that stands between documents; where it is also the end of a
      line, `encode` makes it too.
    fingerprint: tells its table of ids from others of that name; None if there
      is one table only.
  """

  name: str
  vocab_size: int
  eos_id: int
  fingerprint: str | None

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of `text`, int32 [tokens]."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`; an `eos_id` between documents is dropped."""


class ByteTokenizer:
  """One token per byte of the text's UTF-8, and one that ends a document."""

  name = 'bytes'
  vocab_size = 257
  eos_id = 256
  fingerprint = None

  def encode(self, text: str) -> np.ndarray:
    """Returns the UTF-8 bytes of `text`, int32 [bytes]."""
    data = text.encode(errors='surrogateescape')
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""
    kept = bytes(int(i) for i in ids if i != self.eos_id)
    return kept.decode(errors='replace')


# Those that know their ids, and those that ask the data.
_FIXED = {ByteTokenizer.name: ByteTokenizer}
_OF_DATA = {
  kind.name: kind
  for kind in (vocabulary.EnwikTokenizer, vocabulary.WordTokenizer)
}
NAMES = (*_FIXED, *_OF_DATA)


def build(data: ConfigDict) -> Tokenizer:
  """Returns the tokenizer of a config.

  Args:
    data: the keys `config.data`.

  Raises:
    UserError: there is none of that name, or it has to read the data set and
      cannot.
  """
  known = _FIXED | _OF_DATA
  kind = known[errors.choose('data.tokenizer', data.tokenizer, known)]
  if data.tokenizer in _FIXED:
    return kind()
  splits = sources.open_splits(data)
  folder = splits[0].folder
  return vocabulary.load_or_make(kind, folder, data.text_key, splits)


def vocab_size(data: ConfigDict, declared: int) -> int:
  """The number of ids; reads no data set if it is `declared`.

  Args:
    data: the keys `config.data`.
    declared: `model.vocab_size`, 0 if it is the tokenizer's.

  Raises:
    UserError: as `build`.
  """
  if declared and data.tokenizer in _OF_DATA:
    return declared
  return build(data).vocab_size
