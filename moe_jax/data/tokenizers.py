"""Text to token ids and back.

`data.tokenizer` is a name, or the path of a file: see `subwords`.

A user's own tokenizer is a class that is made of `config.data`, registered in a
config file:

  @TOKENIZERS.register('mine')
  class Mine:
    def __init__(self, data): ...
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

from moe_jax import files
from moe_jax.data import sources, subwords, vocabulary
from moe_jax.errors import choose
from moe_jax.registry import TOKENIZERS


class Tokenizer(Protocol):
  """What the pipeline asks of a tokenizer."""

  @property
  def name(self) -> str:
    """Names the files that depend on it.

    Two tokenizers that encode differently have different names.
    """

  @property
  def vocab_size(self) -> int:
    """The number of ids: every id is in [0, vocab_size)."""

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


@TOKENIZERS.register('bytes')
def _bytes(data: ConfigDict) -> Tokenizer:
  del data
  return ByteTokenizer()


@TOKENIZERS.register('enwik8')
def _enwik8(data: ConfigDict) -> Tokenizer:
  return _of_data(vocabulary.EnwikTokenizer, data)


@TOKENIZERS.register('words')
def _words(data: ConfigDict) -> Tokenizer:
  return _of_data(vocabulary.WordTokenizer, data)


# Those that have to read the data set to know their ids.
_READ_DATA = ('enwik8', 'words')


def build(data: ConfigDict) -> Tokenizer:
  """Returns the tokenizer of a config.

  Args:
    data: The section `config.data`.

  Raises:
    UserError: There is none of that name, its file is none, or it has to read
      the data set and cannot.
  """
  check_name('data.tokenizer', data.tokenizer)
  if files.tokenizer_file(data.tokenizer):
    return subwords.load(data.tokenizer)
  return TOKENIZERS[data.tokenizer](data)


def files_of(tokenizer: Tokenizer) -> dict[str, bytes]:
  """Returns the file that a tokenizer is, by the name of a copy; or nothing."""
  if isinstance(tokenizer, subwords.SubwordTokenizer):
    return {tokenizer.file_name: tokenizer.content}
  return {}


def check_name(key: str, name: str) -> None:
  """Refuses what is neither the name of a tokenizer nor a path of one.

  Raises:
    UserError: The message has the key and lists the tokenizers.
  """
  if not files.tokenizer_file(name):
    choose(key, name, [*TOKENIZERS, 'PATH.json', 'PATH.model'])


def vocab_size(data: ConfigDict, declared: int) -> int:
  """Returns the number of ids; reads no data set if it is `declared`.

  Args:
    data: The section `config.data`.
    declared: `model.vocab_size`, 0 if it is the tokenizer's.

  Raises:
    UserError: As `build`.
  """
  if declared and data.tokenizer in _READ_DATA:
    return declared
  return build(data).vocab_size


def _of_data(
  kind: type[vocabulary.VocabularyTokenizer], data: ConfigDict
) -> Tokenizer:
  """Returns the tokenizer whose vocabulary is that of the data set."""
  splits = sources.open_splits(data)
  folder, apart = splits[0].folder, [_Apart(each) for each in splits]
  return vocabulary.load_or_make(kind, folder, data.text_key, apart)


class _Apart:
  """Texts with an end of a line between the parts that are encoded apart."""

  def __init__(self, documents: sources.Documents) -> None:
    self._documents = documents

  def __len__(self) -> int:
    return len(self._documents)

  def __getitem__(self, i: int) -> str:
    [parts] = self._documents.parts(i, i + 1)
    return '\n'.join(text for text, _ in parts)
