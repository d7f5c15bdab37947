"""Makes a sub-word vocabulary of a data set, and shows what it makes of a text.

moe_jax tokenizer train --config=NAME --kind=bpe --size=8192 --output=FILE
moe_jax tokenizer show FILE --text=TEXT
"""

import argparse
import itertools
import os
import sys

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli, disk, errors, files
from moe_jax.errors import UserError

_TRAIN = 'train'
_ABOUT_TRAIN = """\
Makes a sub-word vocabulary of the documents of `data.train_split`.

  moe_jax tokenizer train --config=NAME --kind=bpe --size=8192 --output=FILE

--kind is bpe (bytes, merged; FILE.json), unigram (SentencePiece's; FILE.model)
or words (FILE.json). The same command makes the same file, which
--config.data.tokenizer=FILE then takes.
"""
_SHOWN = 256  # documents that the length of a token is measured of


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of `train`."""
  flags.DEFINE_string(
    'kind', 'bpe', 'bpe, unigram or words', flag_values=values
  )
  flags.DEFINE_integer(
    'size', None, 'the most ids of the vocabulary', flag_values=values
  )
  flags.DEFINE_string(
    'output', '', 'the file to write, .json or .model', flag_values=values
  )


def train(config: ConfigDict, kind: str, size: int | None, output: str) -> None:
  """Writes a tokenizer made of the config's data to `output`."""
  from moe_jax.data import mixtures, subword_training, subwords
  from moe_jax.data.progress import counted

  if size is None:
    raise UserError('--size is missing: the most ids of the vocabulary')
  errors.choose('--kind', kind, subword_training.KINDS)
  ending = subword_training.KINDS[kind][2]
  output = files.expand(output)
  if os.path.splitext(output)[1] != ending:
    raise UserError(
      f'--output = {output!r} must be a file named {ending} for --kind={kind}'
    )
  files.check_output('--output', output, f'tokenizer{ending}')
  opened = list(mixtures.open_documents(config.data).values())
  texts = (
    each[i]
    for each in opened
    for i in counted(f'a tokenizer of {each.full_name}', range(len(each)))
  )
  content = subword_training.train(texts, kind, size)
  disk.retried(output, lambda: files.replace(output, content))

  made = subwords.load(output, '--output')
  first = (each[i] for each in opened for i in range(len(each)))
  shown = list(itertools.islice(first, _SHOWN))
  tokens = sum(len(made.encode(text)) for text in shown)
  of_bytes = sum(len(text.encode(errors='surrogateescape')) for text in shown)
  print(
    f'{output}: {made.name}, {made.vocab_size:,} ids;'
    f' {of_bytes / max(tokens, 1):.2f} bytes a token in the first'
    f' {len(shown):,} documents'
  )


def show(file: str, text: str) -> None:
  """Prints the ids and pieces of a text."""
  from moe_jax.data import subwords

  if not files.tokenizer_file(file):
    raise UserError(f'{file} must be a tokenizer.json or a .model')
  tokenizer = subwords.load(file, 'the tokenizer')
  print(
    f'{tokenizer.name}: {tokenizer.vocab_size:,} ids;'
    f' {tokenizer.eos_id} ends a document, {tokenizer.eos}'
  )
  ids = tokenizer.encode(text).tolist()
  for i, piece in zip(ids, tokenizer.pieces(ids), strict=True):
    print(f'{i:>8}  {errors.printable(piece)}')
  decoded = tokenizer.decode(ids)
  if decoded != text:
    print(f'decoded, it is another text: {errors.printable(decoded)}')


def main() -> None:
  """Does what the command line says, and exits."""
  if sys.argv[1:2] == [_TRAIN]:
    del sys.argv[1]
    cli.main(train, define_flags, workdir=False, about=_ABOUT_TRAIN)
  cli.exit_with(lambda: _run(sys.argv[1:]))


def _run(arguments: list[str]) -> None:
  """Runs `show`, or answers --help."""
  parser = cli.Parser(
    'moe_jax tokenizer',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  commands.add_parser(
    _TRAIN, help='makes a vocabulary of a data set; see train --help'
  )
  command = commands.add_parser('show', help='prints the tokens of a text')
  command.add_argument('file')
  command.add_argument('--text', default='')
  given = parser.parse_args(arguments)
  show(given.file, given.text)
