"""The command line of comparisons: what is planned, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_jax.analysis import compare
from moe_jax.analysis.comparison import Comparison
from moe_jax.config import saved
from moe_jax.errors import UserError
from moe_jax.programs import compare as program
from moe_jax.programs import comparing

OWN = """
from moe_jax import config as config_lib
from moe_jax.config import presets

def get_config(names=''):
  return presets.build(names, config_lib.get_config(), {}, VARIANTS)

VARIANTS = {
  'two': presets.sets({'moe.factors': 2}),
  'gru': presets.sets({'router.recurrent': 'gru'}),
}
"""
SMALL = {'model.num_layers': 1, 'model.hidden_size': 64}


@pytest.fixture
def own(tmp_path: Path) -> str:
  """A config file of a user's."""
  path = tmp_path / 'own.py'
  path.write_text(OWN)
  return str(path)


@pytest.fixture
def begun(own: str, tmp_path: Path) -> Path:
  """The directory of a comparison of `two`, of which seed 4 has begun."""
  workdir = tmp_path / 'begun'
  workdir.mkdir()
  rows = compare.rows(own, SMALL, ['two'])
  made = Comparison(
    str(workdir), own, SMALL, rows, 'two', 'none', [4], {}, 'validation'
  )
  run = made.run_of(rows[0], (), 4)
  folder = workdir / run.workdir
  folder.mkdir(parents=True)
  config = compare.changed(rows[0].config, run.values)
  (folder / 'config.json').write_text(saved.to_json(config))
  made.write()
  return workdir


def plan(monkeypatch: pytest.MonkeyPatch, workdir: Path, *flags: str) -> None:
  """Plans a comparison, which trains nothing."""
  arguments = [f'--workdir={workdir}', '--dry_run', *flags]
  monkeypatch.setattr(sys, 'argv', ['moe_jax compare', *arguments])
  program.run()


def small(own: str) -> list[str]:
  keys = [f'--config.{key}={value}' for key, value in SMALL.items()]
  return [f'--config={own}', *keys]


def test_a_dry_run_tells_sizes_and_writes_nothing(
  own: str,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  workdir = tmp_path / 'new'
  flags = ['--variants=two,gru', '--baseline=base', '--seeds=3,7', '--jobs=1']
  plan(monkeypatch, workdir, *small(own), *flags)
  out = capsys.readouterr().out
  lines = out.splitlines()
  assert [line.split()[0] for line in lines[2:5]] == ['base', 'two', 'gru']
  assert 'router.recurrent = gru' in lines[4] and '%)' in lines[4]
  assert '3 variants, 2 seeds (3, 7), compared with base on validation' in out
  assert '6 runs to do now, 1 side by side' in out
  assert not workdir.exists()


def test_what_the_directory_has_stays(
  begun: Path,
  own: str,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  plan(monkeypatch, begun, *small(own), '--variants=gru', '--seeds=1')
  out = capsys.readouterr().out
  assert '2 variants, 1 seed (0), compared with two' in out
  # Without --config it is that of the directory, keys and all.
  plan(monkeypatch, begun)
  assert capsys.readouterr().out.splitlines()[2].startswith('two')


def test_a_sweep_keeps_its_seed_when_others_are_added(
  own: str,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  rows = compare.rows(own, SMALL, ['two'])
  swept: dict[str, list[Any]] = {'moe.top_k': [1, 2]}
  Comparison(
    str(tmp_path), own, SMALL, rows, 'two', 'none', [4], swept, 'validation'
  ).write()
  (tmp_path / 'two').mkdir()
  flags = ['--sweep=moe.top_k:1,2', '--seeds=2']
  plan(monkeypatch, tmp_path, *small(own), *flags)
  out = capsys.readouterr().out
  assert '3 seeds (4, 0, 1)' in out and 'first with seed 4' in out


@pytest.mark.parametrize(
  'flags, fragments',
  [
    (['--config.train.batch_size=4'], ['train.batch_size was 16, now 4']),
    (['--match=flops'], ['--match of none, now flops']),
    (['--sweep=moe.top_k:1,2'], ['--sweep of none, now moe.top_k']),
    (['--match=size'], ["--match = 'size' is not known", 'parameters']),
    (['--config.seed=1'], ['--config.seed contradicts --seeds']),
    (
      ['--sweep=moe.top_k:1', '--config.moe.top_k=2'],
      ['--config.moe.top_k contradicts --sweep'],
    ),
    (['--sweep=seed:1,2'], ['--sweep: seed', 'give --seeds']),
    (['--seeds=x'], ['--seeds=x must be how many seeds']),
    (['--seeds=0'], ['--seeds=0 must be']),
    (['--seeds=4', '--jobs=0'], ['--jobs = 0 must be at least 1']),
  ],
)
def test_what_is_refused(
  begun: Path,
  own: str,
  monkeypatch: pytest.MonkeyPatch,
  flags: list[str],
  fragments: list[str],
) -> None:
  seeds = [] if any('seeds' in flag for flag in flags) else ['--seeds=4,']
  with pytest.raises(UserError) as error:
    plan(monkeypatch, begun, *small(own), *seeds, *flags)
  for fragment in fragments:
    assert fragment in str(error.value)


def test_a_split_that_is_not_there_is_told_before_anything_is_trained(
  tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(comparing, '_carry_out', lambda *_: pytest.fail())
  workdir = tmp_path / 'new'
  arguments = [*small(own), f'--workdir={workdir}', '--variants=two']
  monkeypatch.setattr(sys, 'argv', ['compare', *arguments, '--split=nowhere'])
  with pytest.raises(UserError, match="split 'nowhere'"):
    program.run()
  assert not (workdir / 'compare.json').exists()


@pytest.mark.parametrize('text', ['[]', '{"format": 0}', '{'])
def test_a_file_of_something_else_is_told(
  tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
  (tmp_path / 'compare.json').write_text(text)
  with pytest.raises(UserError, match=r'compare\.json (is not of|cannot be)'):
    plan(monkeypatch, tmp_path, *small(own), '--variants=two')


def test_what_is_missing(
  tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  for flags, fragment in (
    ([], '--config is missing'),
    ([f'--config={own}'], '--variants is missing'),
    (
      [f'--config={tmp_path}/no.py', '--variants=a'],
      'there is no file or preset',
    ),
  ):
    with pytest.raises(UserError, match=fragment):
      plan(monkeypatch, tmp_path / 'new', *flags)


def test_what_is_written_is_json_without_nan(begun: Path) -> None:
  def refuse(name: str) -> Any:
    raise AssertionError(name)

  text = (begun / 'compare.json').read_text()
  found = json.loads(text, parse_constant=refuse)
  assert found['rows'][0]['mean'] is None and found['overrides'] == SMALL


def test_the_directory_of_a_run_is_refused(
  begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  with pytest.raises(UserError, match='seed-4 is that of a run'):
    plan(monkeypatch, begun / 'two' / 'seed-4')
