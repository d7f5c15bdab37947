"""Classes of tokens: what Python's grammar or an English tagger calls them.

A tagger gives every character of a text a class; a token has that of its first
character that is no space.
"""

import ast
import importlib
import io
import keyword
import tokenize
import warnings
from collections.abc import Iterable
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from moe_jax.data.sources import Documents
from moe_jax.data.tokenizers import Tokenizer

_ASKED = 8  # documents that say what a split is
_FAR = 64  # characters that may lie between two tokens


class Tagger(Protocol):
  """Gives every character of a text a class.

  Attributes:
    source: What the classes come from.
    classes: The names of the classes; the last is that of space.
  """

  source: ClassVar[str]
  classes: ClassVar[tuple[str, ...]]

  def __call__(self, text: str) -> np.ndarray:
    """Returns the number of the class of each character, int8."""
    ...


class PythonTagger:
  """The tokens of Python's own `tokenize`.

  What follows a mistake in the source has no class but that of space.
  """

  source: ClassVar[str] = 'python tokenize'
  classes: ClassVar[tuple[str, ...]] = (
    'keyword',
    'name',
    'number',
    'string',
    'comment',
    'operator',
    'whitespace',
  )

  def __call__(self, text: str) -> np.ndarray:
    """Returns the number of the class of each character, int8."""
    found = np.full(len(text), len(self.classes) - 1, np.int8)
    # As `io.StringIO` and so `tokenize` counts lines, not `splitlines`.
    lines = io.StringIO(text, newline='').readlines()
    starts = np.cumsum([0, *map(len, lines)])
    try:
      for token in tokenize.generate_tokens(iter([*lines, '']).__next__):
        name = self._class(token)
        if name is not None:
          begin, end = (starts[row - 1] + c for row, c in token[2:4])
          found[begin:end] = self.classes.index(name)
    except (tokenize.TokenError, SyntaxError):
      pass  # what was tokenized before it stays
    return found

  def _class(self, token: tokenize.TokenInfo) -> str | None:
    name = tokenize.tok_name[token.type]
    if name == 'NAME':
      return 'keyword' if keyword.iskeyword(token.string) else 'name'
    if name.startswith(('FSTRING', 'TSTRING')):
      return 'string'
    names = {'NUMBER': 'number', 'STRING': 'string', 'COMMENT': 'comment'}
    return names.get(name, 'operator' if name == 'OP' else None)


# The beginnings of the Penn Treebank's tags, the longest that fits first.
_TAGS = {
  'NN': 'noun',
  'VB': 'verb',
  'MD': 'verb',
  'JJ': 'adjective',
  'RB': 'adverb',
  'PRP': 'pronoun',
  'WP': 'pronoun',
  'EX': 'pronoun',
  'DT': 'determiner',
  'PDT': 'determiner',
  'WDT': 'determiner',
  'IN': 'preposition',
  'TO': 'preposition',
  'CC': 'conjunction',
  'CD': 'number',
}
_OTHER = 'other'


class EnglishTagger:
  """The parts of speech of nltk's tagger, which is for English."""

  source: ClassVar[str] = 'nltk'
  classes: ClassVar[tuple[str, ...]] = (
    *dict.fromkeys(_TAGS.values()),
    _OTHER,
    'whitespace',
  )

  def __init__(self) -> None:
    """Loads nltk and its data.

    Raises:
      ImportError, LookupError: One of them is not installed.
    """
    nltk = importlib.import_module('nltk')
    self._tag = nltk.pos_tag
    self._split = nltk.tokenize.wordpunct_tokenize
    self._tag(['a'])

  def __call__(self, text: str) -> np.ndarray:
    """Returns the number of the class of each character, int8."""
    found = np.full(len(text), len(self.classes) - 1, np.int8)
    begin = 0
    for line in text.split('\n'):
      place = begin
      for word, tag in self._tag(self._split(line)):
        place = text.index(word, place)
        found[place : place + len(word)] = self._class(word, tag)
        place += len(word)
      begin += len(line) + 1
    return found

  def _class(self, word: str, tag: str) -> int:
    start = max((t for t in _TAGS if tag.startswith(t)), key=len, default='')
    known = start and any(map(str.isalnum, word))
    return self.classes.index(_TAGS[start] if known else _OTHER)


def tagger_of(documents: Documents) -> Tagger | None:
  """Returns a tagger that fits the documents; None where none is at hand.

  They are Python where most of the first ones are valid modules; anything else
  is taken for English, if nltk and its tagger's data are installed.
  """
  count = min(_ASKED, len(documents))
  valid = sum(_is_python(documents[i]) for i in range(count))
  if 2 * valid > count:
    return PythonTagger()
  try:
    return EnglishTagger()
  except (ImportError, LookupError):
    return None


def _is_python(text: str) -> bool:
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of escapes in the text's strings
      ast.parse(text)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return False
  return bool(text.strip())


class Alignment(NamedTuple):
  """A tokenizer that makes classes in the place of ids.

  `TokenSequences.of_classes` has them beside the ids, token by token.
  What separates documents has a class of its own, the number `classes`.
  """

  tokenizer: Tokenizer
  tagger: Tagger

  @property
  def name(self) -> str:
    """The tokenizer's: its documents are as long."""
    return self.tokenizer.name

  @property
  def fingerprint(self) -> str | None:
    """The tokenizer's."""
    return self.tokenizer.fingerprint

  @property
  def eos_id(self) -> int:
    """The class of what separates documents."""
    return len(self.tagger.classes)

  @property
  def vocab_size(self) -> int:
    """The number of classes, with that of what separates documents."""
    return len(self.tagger.classes) + 1

  def encode(self, text: str) -> np.ndarray:
    """Returns the class of each token of `text`, int32."""
    ids = self.tokenizer.encode(text)
    classes = self.tagger(text).astype(np.int32)
    sizes = [len(c.encode(errors='surrogateescape')) for c in text]
    if len(ids) == sum(sizes):  # a token is a byte
      return np.repeat(classes, sizes)
    pieces = (self.tokenizer.decode([i]).strip() for i in ids.tolist())
    return self._walk(text, classes, pieces, len(ids))

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the names of classes."""
    names = (*self.tagger.classes, '')
    return ' '.join(names[int(i)] for i in ids)

  def _walk(
    self, text: str, classes: np.ndarray, pieces: Iterable[str], count: int
  ) -> np.ndarray:
    """Finds the tokens one behind the other; those not found are space."""
    space = len(self.tagger.classes) - 1
    found, place = np.full(count, space, np.int32), 0
    for i, piece in enumerate(pieces):
      at = text.find(piece, place, place + len(piece) + _FAR) if piece else -1
      if at >= 0:
        found[i] = classes[at]
        place = at + len(piece)
    return found
