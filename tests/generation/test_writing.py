"""Text that grows by tokens: whole characters, stops, and nothing lost."""

import itertools
from pathlib import Path

import pytest

from moe_jax.data import subwords
from moe_jax.data.tokenizers import ByteTokenizer, Tokenizer
from moe_jax.data.vocabulary import EnwikTokenizer, WordTokenizer
from moe_jax.errors import UserError
from moe_jax.generation.writing import Writing, ends_lines, prompt_ids
from tests.helpers import vocabularies

TEXT = 'naïve → 漢字 🙂\n\nend'


def grow(
  tokenizer: Tokenizer, prompt: str, text: str, *stops: str
) -> tuple[Writing, list[str]]:
  """The writing of a text, and what was shown after each of its tokens."""
  ids = tokenizer.encode(prompt).tolist()
  rest = tokenizer.encode(prompt + text).tolist()[len(ids) :]
  writing = Writing(tokenizer, ids, stops)
  pieces = []
  for token in rest:
    pieces.append(writing.add(token))
    if writing.stop:
      break
  return writing, [*pieces, writing.end()]


def test_no_piece_is_half_a_character() -> None:
  writing, pieces = grow(ByteTokenizer(), 'é', TEXT)
  assert writing.text == ''.join(pieces) == TEXT
  assert [piece for piece in pieces if piece] == list(TEXT)


def test_bytes_that_are_no_text_do_not_stop_it() -> None:
  writing = Writing(ByteTokenizer(), [65], ())
  pieces = [writing.add(token) for token in [*b'\xff' * 12, *b'a', 0xC3]]
  pieces.append(writing.end())
  assert writing.text == ''.join(pieces) == '\ufffd' * 12 + 'a\ufffd'


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_sub_words(kind: str, tmp_path: Path) -> None:
  tokenizer = subwords.load(str(vocabularies.write(tmp_path, kind)))
  prompt, text = 'def main', '(self): return 1 if self else None'
  ids = tokenizer.encode(prompt + text).tolist()
  known = next(
    n for n in range(len(ids)) if tokenizer.decode(ids[:n]) == prompt
  )
  writing = Writing(tokenizer, ids[:known], ())
  pieces = [writing.add(token) for token in ids[known:]]
  assert ''.join([*pieces, writing.end()]) == writing.text == text


def test_words_and_lines() -> None:
  tokenizer = WordTokenizer(['the', 'cat', 'sat', '<eos>'])
  writing, _ = grow(tokenizer, 'the\n', 'cat sat\nthe cat\n')
  assert writing.text == 'cat sat\nthe cat\n'


@pytest.mark.parametrize(
  'stops, text, stop',
  [
    (['\n\n'], 'one\ntwo', '\n\n'),
    (['x'], 'one\ntwo\n\nthree', ''),
    (['o\n', 'two'], 'one\n', 'two'),
    (['ne\ntwo\n\nth', 'zz'], 'o', 'ne\ntwo\n\nth'),
    (['three!'], 'one\ntwo\n\nthree', ''),
  ],
)
def test_stops(stops: list[str], text: str, stop: str) -> None:
  writing, pieces = grow(ByteTokenizer(), ' ', 'one\ntwo\n\nthree', *stops)
  assert (writing.text, writing.stop) == (text, stop)
  # What was shown was never taken back.
  shown = list(itertools.accumulate(pieces))
  assert all(text.startswith(each) for each in shown) and shown[-1] == text


def test_of_two_stops_the_first_in_the_text_counts() -> None:
  tokenizer = WordTokenizer(['a', 'b', 'abc', '<eos>'])
  writing = Writing(tokenizer, [], ('c', 'b'))
  writing.add(2)
  assert (writing.text, writing.stop) == ('a', 'b')


def test_a_prompt_begins_a_document() -> None:
  assert prompt_ids(ByteTokenizer(), 'ab') == [256, 97, 98]
  assert prompt_ids(ByteTokenizer(), 'ab', begins=False) == [97, 98]
  with pytest.raises(UserError, match='a prompt is empty'):
    prompt_ids(ByteTokenizer(), '')


def test_an_open_line_stays_open() -> None:
  words = WordTokenizer(['the', 'cat', '<eos>'])
  assert prompt_ids(words, 'the cat') == [0, 1]
  assert prompt_ids(words, 'the cat\n') == [0, 1, 2]
  assert prompt_ids(words, '\n') == [2]
  enwik = EnwikTokenizer(['97', '<eos>'])
  assert prompt_ids(enwik, 'a\n') == [0, 1]
  with pytest.raises(UserError, match='the word'):
    prompt_ids(words, 'the dog')


def test_whose_end_of_a_document_ends_lines() -> None:
  assert not ends_lines(ByteTokenizer())
  assert ends_lines(WordTokenizer(['a', '<eos>']))
  assert ends_lines(EnwikTokenizer(['97', '<eos>']))
