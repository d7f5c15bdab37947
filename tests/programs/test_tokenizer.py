"""`moe_jax tokenizer`: what it writes and prints."""

import json
import sys
from pathlib import Path

import pytest

from moe_jax.programs import tokenizer as program
from tests.helpers import vocabularies


def run(*arguments: str) -> int:
  with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
    patch.setattr(sys, 'argv', ['moe_jax tokenizer', *arguments])
    patch.setenv('MOE_JAX_MALLOC', '0')
    program.main()
  return int(stop.value.code or 0)


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
  """The flags of a folder of texts."""
  folder = tmp_path / 'texts'
  folder.mkdir()
  for i, text in enumerate(vocabularies.TEXTS):
    (folder / f'{i}.txt').write_text(text)
  return [
    '--config=base',
    '--config.data.name=text_folder',
    f'--config.data.path={folder}',
    f'--config.data.dir={tmp_path / "prepared"}',
  ]


@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'words'])
def test_the_same_command_makes_the_same_file(
  kind: str,
  corpus: list[str],
  tmp_path: Path,
  capfd: pytest.CaptureFixture[str],
) -> None:
  ending = 'model' if kind == 'unigram' else 'json'
  # Also where its folder is not there yet.
  paths = [tmp_path / 'made' / f'{name}.{ending}' for name in 'ab']
  size = vocabularies.SIZES[kind]
  for path in paths:
    flags = f'--kind={kind}', f'--size={size}', f'--output={path}'
    assert run('train', *corpus, *flags) == 0
  a, b = (path.read_bytes() for path in paths)
  assert a == b
  told = capfd.readouterr().out
  assert f' {size} ids;' in told and 'bytes a token in the first' in told


def test_tokens_are_shown(
  tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
  path = vocabularies.write(tmp_path, 'bpe')
  assert run('show', str(path), '--text=the words\n') == 0
  head, *tokens = capfd.readouterr().out.splitlines()
  assert '300 ids; 0 ends a document, <|endoftext|>' in head
  assert ''.join(line.split()[1] for line in tokens) == 'theĠwordsĊ'


def test_a_vocabulary_of_all_sources_of_a_mixture(
  tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
  given = {}
  for name in ('first', 'second'):
    path = tmp_path / f'{name}.jsonl'
    rows = [json.dumps({'text': f'{name} {i}'}) for i in range(99)]
    path.write_text('\n'.join(rows))
    given[name] = {'path': str(path)}
  (tmp_path / 'mix.json').write_text(json.dumps(given))
  flags = (
    '--config=base',
    f'--config.data.mixture={tmp_path / "mix.json"}',
    f'--config.data.dir={tmp_path / "prepared"}',
    *('--kind=words', '--size=9', f'--output={tmp_path / "words.json"}'),
  )
  assert run('train', *flags) == 0
  made = (tmp_path / 'words.json').read_text()
  assert '"first"' in made and '"second"' in made


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['train', '--config=base', '--output=a.json'], '--size is missing'),
    (
      ['train', '--config=base', '--size=300', '--output=a.model'],
      "--output = 'a.model' must be a file named .json for --kind=bpe",
    ),
    (
      ['train', '--config=base', '--size=300', '--output=/dev/null/a.json'],
      '--output: /dev/null/a.json cannot be written',
    ),
    (
      ['train', '--config=base', '--size=300', '--kind=bpee'],
      "--kind = 'bpee' is not known",
    ),
    (['show', 'a.txt'], 'a.txt must be a tokenizer.json or a .model'),
    (['show', 'none.json'], "the tokenizer = 'none.json' cannot be read"),
    (['shw'], "invalid choice: 'shw'"),
    ([], 'required: COMMAND'),
  ],
)
def test_mistakes_are_one_line(
  arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
  assert run(*arguments) == 2
  error = capfd.readouterr().err
  assert message in error and error.count('\n') == 1


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
  assert run('--help') == 0
  assert run('train', '--help') == 0
  told = capfd.readouterr().out
  assert 'moe_jax tokenizer show FILE' in told and '--kind' in told
