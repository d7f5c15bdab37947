"""Tokenizers from files, made here."""

import functools
import json
from pathlib import Path

from moe_jax.data import subword_training

_LINES = 'import module_{0}\nvalue_{0} = module_{0}.f({0})\n'
TEXTS = (
  'def f(x):\n  return x + 1  # one more\n',
  'class A:\n\tpass\n\n\nprint("αβ→ \U0001f600")\r\n',
  'the words of a text, the words of another text\n' * 20,
  *map(_LINES.format, range(40)),
)
SIZES = {'bpe': 300, 'unigram': 330, 'words': 60}


@functools.cache
def content(kind: str) -> bytes:
  """The file of a tokenizer of that kind."""
  return subword_training.train(TEXTS, kind, SIZES[kind])


def write(folder: Path, kind: str) -> Path:
  """A tokenizer of that kind, written into a folder."""
  path = folder / f'{kind}{subword_training.KINDS[kind][2]}'
  path.write_bytes(content(kind))
  return path


def of_size(path: Path, size: int) -> str:
  """A tokenizer.json of so many ids, the path as a config has it."""
  ids = {f't{i}': i for i in range(size - 1)} | {'</s>': size - 1}
  model = {'type': 'WordLevel', 'vocab': ids, 'unk_token': 't0'}
  values = {'model': model, 'pre_tokenizer': {'type': 'Whitespace'}}
  path.write_text(json.dumps({'version': '1.0'} | values))
  return str(path)
