"""`moe_jax generate`: what it prints, and each mistake in one line."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_jax.interop import checkpoint
from moe_jax.programs import generate as program
from moe_jax.programs import token_colours
from tests.helpers import tiny


@pytest.fixture(scope='module')
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run of step 0."""
  config = tiny.config(**{'moe.factors': 2, 'model.num_layers': 1})
  folder = tmp_path_factory.mktemp('run')
  checkpoint.write_run(folder, config, checkpoint.initial_params(config))
  return folder


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Run:
  """Runs the program; returns its status and what it printed."""

  def call(*flags: str, **patches: Any) -> tuple[int, str, str]:
    arguments = ['moe_jax generate', f'--workdir={workdir}', *flags]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as s:
      patch.setattr(sys, 'argv', arguments)
      patch.setenv('MOE_JAX_MALLOC', '0')
      for name, value in patches.items():
        patch.setattr(sys, name, value)
      program.main()
    return int(s.value.code or 0), *capsys.readouterr()

  return call


def rows(printed: str) -> list[dict[str, Any]]:
  return [json.loads(line) for line in printed.splitlines()]


@pytest.mark.slow
def test_text_and_json_are_the_same(run: Run, tmp_path: Path) -> None:
  """Of one prompt, of several, and of a file."""
  flags = '--max_tokens=6', '--seed=3', '--temperature=0.9', '--top_k=9'
  status, text, _ = run('--prompt=ab', *flags)
  assert status == 0
  status, printed, _ = run('--prompt=ab', '--json', *flags)
  [row] = rows(printed)
  assert row['prompt'] == 'ab' and row['step'] == 0
  assert text == f'ab{row["text"]}\n'
  assert len(row['ids']) == 6 if row['ended'] == 'length' else row['ids'] == []
  file = tmp_path / 'prompts.jsonl'
  file.write_text('{"prompt": "ab"}\n{"prompt": "c\\nd", "more": 1}\n')
  _, printed, _ = run(f'--prompts={file}', '--prompt=z', '--json', *flags)
  assert [each['prompt'] for each in rows(printed)] == ['z', 'ab', 'c\nd']
  _, printed, _ = run(f'--prompts={file}', '--json', *flags)
  assert rows(printed)[0] == row
  _, printed, _ = run(f'--prompts={file}', *flags)
  assert f'-------- 0\n{text}-------- 1\nc\nd' in printed


@pytest.mark.slow
def test_experts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
  flags = '--prompt=ab', '--experts', '--layer=1A', '--max_tokens=4'
  _, printed, _ = run(*flags, '--json')
  [row] = rows(printed)
  assert len(row['experts']) == 3 + len(row['ids'])  # what begins a document
  assert set(row['experts']) <= set(range(8))
  _, printed, _ = run(*flags)
  assert printed.startswith(f'a[{row["experts"][1]}]b[{row["experts"][2]}]')
  monkeypatch.setenv('FORCE_COLOR', '1')
  _, printed, _ = run(*flags)
  assert printed.startswith(token_colours.coloured('a', row['experts'][1]))


@pytest.mark.slow
def test_interactive(run: Run) -> None:
  lines = io.StringIO('ab\n\nc\n')
  status, printed, _ = run('--interactive', '--max_tokens=2', stdin=lines)
  assert status == 0
  first, second = printed.index('ab'), printed.index('\nc')
  assert first == 0 < second


def test_longer_than_in_training_is_told(run: Run) -> None:
  _, _, told = run('--prompt=ab', '--max_tokens=14')
  assert 'note: up to 17 tokens, and the model was trained on 16' in told
  _, _, told = run('--prompt=ab', '--max_tokens=13')
  assert told == ''


BAD: dict[str, tuple[list[str], str]] = {
  'no prompt': ([], '--prompt is missing'),
  'empty prompt': (['--prompt='], 'the prompt is empty'),
  'one is empty': (['--prompt=a', '--prompt='], 'the prompt number 1 is empty'),
  'no file': (['--prompts=/none'], "--prompts = '/none' cannot be read"),
  'no tokens': (['--prompt=a', '--max_tokens=0'], 'max_tokens = 0 must be'),
  'seed': (['--prompt=a', '--seed=-1'], 'seed = -1 must be from 0'),
  'cold': (['--prompt=a', '--temperature=-1'], 'temperature = -1.0 must be'),
  'top_p': (['--prompt=a', '--top_p=0'], 'top_p = 0.0 must be above 0'),
  'empty stop': (['--prompt=a', '--stop='], 'a stop is empty'),
  'no layer': (
    ['--prompt=a', '--experts', '--layer=2A'],
    "--layer = '2A' is not known",
  ),
  'no step': (['--prompt=a', '--step=7'], 'step 7'),
  'misspelt': (['--promt=a'], "did you mean '--prompt'"),
}


@pytest.mark.parametrize('name', BAD)
def test_mistakes(name: str, run: Run) -> None:
  flags, message = BAD[name]
  status, printed, told = run(*flags)
  assert (status, printed) == (2, '')
  assert told.startswith('error: ') and told.count('\n') == 1
  assert message in told


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('a.txt', 'one\n\nthree\n', ':2: the prompt is empty'),
    ('a.txt', '', 'has no line'),
    ('a.jsonl', '{"prompt": "a"}\n{"text": "b"}\n', ':2: no JSON object with'),
    ('a.jsonl', '[1]\n', ':1: no JSON object with a field "prompt"'),
    ('a.jsonl', '{"prompt": 3}\n', ':1: the field "prompt" is no text'),
    ('a.jsonl', '{"prompt": ""}\n', ':1: the prompt is empty'),
  ],
)
def test_mistakes_in_files(
  name: str, content: str, message: str, run: Run, tmp_path: Path
) -> None:
  path = tmp_path / name
  path.write_text(content)
  status, _, told = run(f'--prompts={path}')
  assert status == 2 and message in told


def test_what_a_model_writes_cannot_steer_a_terminal() -> None:
  assert token_colours.visible('a\x1b[2Jb\r\n\tc') == 'a\\x1b[2Jb\\x0d\n\tc'


def test_colours_of_neighbours_differ() -> None:
  styles = [token_colours.coloured('x', expert) for expert in range(16)]
  assert len(set(styles)) == 16
  assert token_colours.coloured('a\n\nb', 3).count('\n') == 2
  assert token_colours.coloured('a', None) == 'a'
