"""Text to token ids and back."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

from moe_jax import errors
from moe_jax.data import sources, vocabulary


class Tokenizer(Protocol):
  """What the pipeline asks of a tokenizer."""

  @property
  def name(self) -> str:
    """Names the files that depend on it.

    Two tokenizers that encode differently have different names.
    """

  @property
  def vocab_size(self) -> int:
    """Every id is in [0, vocab_size)."""

  @property
  def eos_id(self) -> int:
    """The id that stands between documents.

    Where it is also the end of a line, `encode` makes it too.
    """

  @property
  def fingerprint(self) -> str | None:
    """Tells its table of ids from others of that name.

    It is None if there is one table only.
    """

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
  name = errors.choose('data.tokenizer', data.tokenizer, NAMES)
  if name in _FIXED:
    return _FIXED[name]()
  splits = sources.open_splits(data)
  folder = splits[0].folder
  return vocabulary.load_or_make(_OF_DATA[name], folder, data.text_key, splits)


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
