"""Measurements of experts report what they promise; times are not judged."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest

from benchmarks import grouped_matmul, moe_layer, timing
from moe_jax import runtime
from moe_jax.model import tuned


@pytest.fixture(autouse=True)
def no_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
  """The settings would stay for the tests that come after."""
  monkeypatch.setenv(runtime.SWITCH, '0')


def test_grouped_matmul_measures_all_that_runs_here(
  monkeypatch: pytest.MonkeyPatch,
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.setenv('MOE_JAX_TUNED', str(tmp_path / 'tuned.json'))
  grouped_matmul.main(
    ['--sizes=60x16x8x4', '--rounds=1', '--tune', '--all', '--json']
  )
  row = json.loads(capsys.readouterr().out)
  names = {'blocks', 'ragged_dot', 'padded'}
  assert row['implementations'].keys() == row['ratios'].keys() == names
  seconds = row['implementations']['padded']
  assert row['tflops']['padded'] == 6 * 60 * 16 * 8 / seconds / 1e12
  assert row['skew'] >= 1
  tuned_to = tuned.best(jax.devices()[0], names)
  fastest = min(names, key=row['implementations'].get)
  assert tuned_to == {'64 rows, 4 x 16 x 8, float32': fastest}
  grouped_matmul.main(['--show_tuned'])
  assert fastest in capsys.readouterr().out


def test_moe_layer_compares_with_the_dense_one(
  capsys: pytest.CaptureFixture[str],
) -> None:
  moe_layer.main(
    ['--sizes=16x2x8x12x4', '--kinds=half', '--rounds=1', '--json']
  )
  row = json.loads(capsys.readouterr().out)
  seconds = row['seconds']
  assert row['ratios'] == {'dense': seconds['dropless'] / seconds['dense']}
  assert row['skew'] == 2.0  # half of the assignments, and four experts


def test_choices_are_what_their_names_say() -> None:
  for kind, skewed in (('balanced', 1.0), ('half', 4.0)):
    chosen = timing.choices(kind, 64, 2, 8)
    assert chosen.shape == (64, 2) and chosen.max() < 8
    assert timing.skew(chosen, 8) == skewed, kind
  chosen = timing.choices('random', 64, 2, 8)
  assert (chosen[:, 0] != chosen[:, 1]).all()  # as a router chooses


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--peer'], "--peer needs transformers: pip install -e '.[interop]'"),
    (['--rounds=0'], '--rounds = 0 must be at least 1'),
    (['--peer', '--threads=0'], '--threads = 0 must be at least 1'),
    (
      ['--sizes=16x8x8x12x4', '--kinds=random'],
      '--sizes = 16x8x8x12x4: a token cannot choose K = 8 of N = 4 experts',
    ),
    (['--sizes=16x2x8'], 'argument --sizes: invalid tokens x top_k x hidden'),
    (['--kinds=hlf'], "--kinds = 'hlf' is not known; did you mean 'half'?"),
  ],
)
def test_moe_layer_says_what_is_wrong(
  arguments: list[str],
  message: str,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  there = '--threads=0' in arguments or None
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: there)
  with pytest.raises(SystemExit) as stopped:
    moe_layer.main(arguments)
  assert stopped.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith(f'error: {message}') and said.count('\n') == 1


def test_what_cannot_be_kept_is_not_measured(
  monkeypatch: pytest.MonkeyPatch,
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  (tmp_path / 'file').touch()
  path = tmp_path / 'file' / 'tuned.json'
  monkeypatch.setenv('MOE_JAX_TUNED', str(path))
  monkeypatch.setattr(grouped_matmul, 'measure', None)
  with pytest.raises(SystemExit) as stopped:
    grouped_matmul.main(['--tune'])
  said = capsys.readouterr().err
  assert stopped.value.code == 2
  assert f'error: --tune cannot write {path}' in said
  assert 'MOE_JAX_TUNED' in said and said.count('error: ') == 1
