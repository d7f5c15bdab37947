"""Tokenizers whose ids are those of the tokens that a data set holds.

As in the CompeteSMoE code base, a vocabulary is read off the splits train,
validation and test, in order of appearance, so every token of the data has an
id and no id is idle; the end of a line is the token `<eos>`. A fixed table
would say the same of enwik8 and be wrong of any other text.
"""

import contextlib
import hashlib
import json
import os
import urllib.parse
import uuid
from collections.abc import Iterable, Sequence
from typing import ClassVar, Protocol

import numpy as np
from etils import epath

from moe_jax import errors, files
from moe_jax.data.progress import counted

EOS = '<eos>'


class Texts(Protocol):
  """The documents of a split."""

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> str: ...


class VocabularyTokenizer:
  """Ids by order of appearance; see the module.

  Attributes:
    name: As in `tokenizers.Tokenizer`, which has all others.
  """

  name: ClassVar[str]

  def __init__(self, tokens: Sequence[str]) -> None:
    """Takes the vocabulary; `<eos>` is added to it if it is not there."""
    self.tokens = [*tokens] if EOS in tokens else [*tokens, EOS]
    self.index = {token: i for i, token in enumerate(self.tokens)}
    self.vocab_size = len(self.tokens)
    self.eos_id = self.index[EOS]
    table = json.dumps(self.tokens).encode()
    self.fingerprint = hashlib.sha256(table).hexdigest()

  @staticmethod
  def distinct(text: str) -> Iterable[str]:
    """Returns the tokens of a text once each, in order of appearance."""
    raise NotImplementedError

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of `text`, int32; UserError if one is missing."""
    raise NotImplementedError

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`."""
    raise NotImplementedError


class WordTokenizer(VocabularyTokenizer):
  """One token per word, words being what white space separates."""

  name = 'words'

  @staticmethod
  def distinct(text: str) -> Iterable[str]:
    return dict.fromkeys(_words(text))

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of the words and ends of lines, int32.

    Raises:
      UserError: A word is not in the vocabulary.
    """
    try:
      return np.array([self.index[word] for word in _words(text)], np.int32)
    except KeyError as error:
      raise _unknown(self.name, f'the word {error}') from error

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the words, a space between any two on a line."""
    text = ' '.join(self.tokens[int(i)] for i in ids)
    return text.replace(f' {EOS}', '\n').replace(EOS, '\n').replace('\n ', '\n')


class EnwikTokenizer(VocabularyTokenizer):
  """One token per byte value, named by its number; the newline is `<eos>`."""

  name = 'enwik8'

  def __init__(self, tokens: Sequence[str]) -> None:
    super().__init__(tokens)
    self._values = [10 if t == EOS else int(t) for t in self.tokens]
    if min(self._values) < 0 or max(self._values) > 255:
      raise ValueError('a token is no byte')
    self._ids = np.full(256, -1, np.int32)
    self._ids[self._values] = np.arange(self.vocab_size)

  @staticmethod
  def distinct(text: str) -> Iterable[str]:
    values, first = np.unique(_bytes(text), return_index=True)
    ordered = values[np.argsort(first)]
    return [EOS if value == 10 else str(value) for value in ordered]

  def encode(self, text: str) -> np.ndarray:
    """Returns an id for each byte, int32.

    Raises:
      UserError: A byte is not in the vocabulary.
    """
    values = _bytes(text)
    ids = self._ids[values]
    if (ids < 0).any():
      value = values[np.argmin(ids)]
      raise _unknown(self.name, f'the byte {value} (0x{value:02x})')
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text; bytes that are not UTF-8 become U+FFFD."""
    return bytes(self._values[int(i)] for i in ids).decode(errors='replace')


def load_or_make(
  kind: type[VocabularyTokenizer],
  folder: epath.Path,
  text_key: str,
  splits: Iterable[Texts],
) -> VocabularyTokenizer:
  """Returns the tokenizer of a data set.

  The first call reads all splits and leaves the vocabulary beside the prepared
  data, for the next run and for other processes. What is there and is none is
  made anew.

  Args:
    kind: The class of the tokenizer.
    folder: The folder of the prepared data.
    text_key: The feature of the texts; another one has its own vocabulary.
    splits: The splits in the order in which tokens get their ids; they are read
      only if needed.
  """
  feature = urllib.parse.quote(text_key, safe='')
  path = folder / f'dictionary-{feature}-{kind.name}.json'
  with contextlib.suppress(OSError, ValueError):
    return kind(_read(path))
  found: dict[str, None] = {}
  for documents in splits:
    for i in counted(f'the vocabulary of {kind.name}', range(len(documents))):
      found |= dict.fromkeys(kind.distinct(documents[i]))
  _save(path, list(found))
  return kind(list(found))


def _read(path: epath.Path) -> list[str]:
  """Returns the tokens in a file; ValueError if it holds anything else."""
  tokens = files.read_json(path)
  if not isinstance(tokens, list) or not all(
    isinstance(token, str) for token in tokens
  ):
    raise ValueError(f'{path} is no list of tokens')
  if not tokens or len(set(tokens)) < len(tokens):
    raise ValueError(f'{path} is no vocabulary')
  return tokens


def _save(path: epath.Path, tokens: list[str]) -> None:
  """Saves in one move, so that no process reads half a file."""
  aside = path.parent / f'{path.name}.{os.getpid()}-{uuid.uuid4().hex}'
  try:
    aside.write_text(json.dumps(tokens))
    aside.replace(path)
  except OSError:
    # A data folder that may only be read: every run reads all splits anew.
    with contextlib.suppress(OSError):
      aside.unlink(missing_ok=True)


def _words(text: str) -> list[str]:
  lines = text.replace('\r\n', '\n').replace('\r', '\n').split('\n')
  if not lines[-1]:
    lines.pop()  # nothing follows the last end of a line
  return [word for line in lines for word in (*line.split(), EOS)]


def _bytes(text: str) -> np.ndarray:
  return np.frombuffer(text.encode(errors='surrogateescape'), np.uint8)


def _unknown(name: str, what: str) -> errors.UserError:
  return errors.UserError(
    f'data.tokenizer = {name!r}: {what} is in none of the splits that the'
    ' vocabulary was made of; read the data set it was made of'
  )
