"""What class every token of a text has."""

import sys
import types
from collections.abc import Iterable

import numpy as np
import pytest

from moe_jax.analysis import token_classes
from moe_jax.analysis.token_classes import Alignment, PythonTagger
from moe_jax.data.tokenizers import ByteTokenizer
from moe_jax.data.vocabulary import WordTokenizer

SOURCE = '''\
def f(x):  # naïve → yes
  """Doc
  string."""
  return x + 1.5
'''
# The class of every character of it: of a keyword, a name, a number, a string,
# a comment, an operator; a point is whitespace. Ends of lines are characters.
WANTED = 'kkk.nonoo..ccccccccccccc...sssssssssssssssssss...kkkkkk.n.o.ddd.'
LETTERS = {
  'k': 'keyword',
  'n': 'name',
  'd': 'number',
  's': 'string',
  'c': 'comment',
  'o': 'operator',
  '.': 'whitespace',
}


def names(tagger: token_classes.Tagger, numbers: Iterable[int]) -> list[str]:
  return [tagger.classes[i] for i in numbers]


def wanted() -> list[str]:
  return [LETTERS[letter] for letter in WANTED]


def test_python_by_character() -> None:
  tagger = PythonTagger()
  found = names(tagger, tagger(SOURCE))
  assert list(zip(SOURCE, found, strict=True)) == list(
    zip(SOURCE, wanted(), strict=True)
  )


def test_bytes_have_the_class_of_their_character() -> None:
  tagger = PythonTagger()
  aligned = Alignment(ByteTokenizer(), tagger)
  found = names(tagger, aligned.encode(SOURCE))
  by_byte = [
    name
    for character, name in zip(SOURCE, wanted(), strict=True)
    for _ in character.encode()
  ]
  assert found == by_byte
  assert aligned.eos_id == len(tagger.classes) == aligned.vocab_size - 1


def test_words_have_the_class_of_their_first_character() -> None:
  tokenizer = WordTokenizer(list(WordTokenizer.distinct(SOURCE)))
  tagger = PythonTagger()
  aligned = Alignment(tokenizer, tagger)
  words = [tokenizer.tokens[i] for i in tokenizer.encode(SOURCE)]
  found = dict(zip(words, names(tagger, aligned.encode(SOURCE)), strict=True))
  assert found == {
    'def': 'keyword',
    'f(x):': 'name',
    '#': 'comment',
    'naïve': 'comment',
    '→': 'comment',
    'yes': 'comment',
    '"""Doc': 'string',
    'string."""': 'string',
    'return': 'keyword',
    'x': 'name',
    '+': 'operator',
    '1.5': 'number',
    '<eos>': 'whitespace',
  }


@pytest.mark.parametrize(
  'text', ['', 'x = (1,\n', 'if x:\n    a\n  b\n', '\x00', "s = 'open\nx\n"]
)
def test_text_that_is_not_python_is_no_error(text: str) -> None:
  assert len(PythonTagger()(text)) == len(text)


class Texts(list):
  """What is read of `Documents`."""


def test_python_is_known_by_its_grammar(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setitem(sys.modules, 'nltk', None)  # not installed
  assert isinstance(
    token_classes.tagger_of(Texts([SOURCE, SOURCE, 'not python'])), PythonTagger
  )
  assert token_classes.tagger_of(Texts(['Plain text.', '', SOURCE])) is None
  assert token_classes.tagger_of(Texts([''])) is None


def test_english_by_a_tagger(monkeypatch: pytest.MonkeyPatch) -> None:
  """A tagger of nltk's form; nltk's own needs data that are not a package."""
  tags = {'The': 'DT', 'old': 'JJ', 'cat': 'NN', 'ran': 'VBD', '.': '.'}
  nltk = types.SimpleNamespace(
    pos_tag=lambda words: [(w, tags.get(w, 'NN')) for w in words],
    tokenize=types.SimpleNamespace(
      wordpunct_tokenize=lambda line: line.replace('.', ' .').split()
    ),
  )
  monkeypatch.setitem(sys.modules, 'nltk', nltk)
  tagger = token_classes.tagger_of(Texts(['The old cat.']))
  assert tagger is not None and tagger.source == 'nltk'
  text = 'The old cat\nran.'
  found = names(tagger, tagger(text))
  assert found == [
    *['determiner'] * 3,
    'whitespace',
    *['adjective'] * 3,
    'whitespace',
    *['noun'] * 3,
    'whitespace',
    *['verb'] * 3,
    'other',
  ]


def test_data_that_nltk_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
  def missing(words: list[str]) -> None:
    raise LookupError('averaged_perceptron_tagger_eng')

  nltk = types.SimpleNamespace(
    pos_tag=missing,
    tokenize=types.SimpleNamespace(wordpunct_tokenize=str.split),
  )
  monkeypatch.setitem(sys.modules, 'nltk', nltk)
  assert token_classes.tagger_of(Texts(['The old cat.'])) is None


def test_classes_are_int32_ids() -> None:
  ids = Alignment(ByteTokenizer(), PythonTagger()).encode(SOURCE)
  assert ids.dtype == np.int32 and len(ids) == len(SOURCE.encode())
