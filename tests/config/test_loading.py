"""Where configs are found, and the code of users that they bring along."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax import cli
from moe_jax import config as config_lib
from moe_jax.config import loading, saved, user_code
from moe_jax.errors import UserError
from moe_jax.registry import GATES

MINE = """
from moe_jax.config import get_config as defaults
from moe_jax.registry import GATES

@GATES.register('{name}')
class Mine:
  pass

def get_config(names=''):
  config = defaults()
  config.router.score = '{name}'
  return config
"""


@pytest.fixture(autouse=True)
def in_an_empty_directory(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.chdir(tmp_path)
  # What a test registers is gone after it.
  for part in ('_entries', '_files'):
    monkeypatch.setattr(GATES, part, dict(getattr(GATES, part)))


def test_presets_are_found_by_name_from_anywhere() -> None:
  config = loading.load('rmoe:enwik8_small,np')
  assert config.model.hidden_size == 264
  assert config.router.passing == 'none'
  assert loading.load('configs/rmoe.py:enwik8_small,np') == config
  assert loading.load('base') == config_lib.get_config()
  assert 'quickstart' in loading.preset_files()


def test_a_file_goes_before_a_preset_of_its_name(tmp_path: Path) -> None:
  text = 'from configs import base\n\ndef get_config():\n'
  text += '  config = base.get_config()\n  config.seed = 7\n  return config\n'
  (tmp_path / 'quickstart').mkdir()
  assert loading.load('quickstart').seed == 0
  (tmp_path / 'quickstart.py').write_text(text)
  assert loading.load('quickstart.py').seed == 7


def test_a_path_may_hold_colons(tmp_path: Path) -> None:
  folder = tmp_path / 'run:12:30'
  folder.mkdir()
  (folder / 'config.json').write_text(saved.to_json(loading.load('base')))
  assert loading.load(str(folder / 'config.json')).seed == 0
  (folder / 'mine.py').write_text(
    'from moe_jax.config import loading\n\n'
    'def get_config(names):\n  return loading.load(f"rmoe:{names}")\n'
  )
  config = loading.load(f'{folder}/mine.py:enwik8_small,np')
  assert config.router.passing == 'none'


def test_a_preset_that_is_not_there_is_one_line() -> None:
  with pytest.raises(UserError, match=r"rmeo; did you mean 'rmoe'\? \(.*base"):
    loading.load('rmeo:np')


def test_the_home_directory_is_expanded(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('HOME', str(tmp_path))
  config = config_lib.get_config()
  config.data.path = '~/texts'
  (tmp_path / 'config.json').write_text(saved.to_json(config))
  assert loading.load('~/config.json').data.path == f'{tmp_path}/texts'


def test_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
  modules = []
  for folder in ('a', 'b'):
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / 'same.py'
    path.write_text(f'NAME = {folder!r}\n')
    modules.append(user_code.import_file(str(path)))
  assert [module.NAME for module in modules] == ['a', 'b']
  assert all(sys.modules[module.__name__] is module for module in modules)


def test_what_a_config_file_registers_is_known(tmp_path: Path) -> None:
  (tmp_path / 'mine.py').write_text(MINE.format(name='of_loading'))
  config = loading.load('mine.py')
  config_lib.validate(config, 1)
  assert loading.extensions() == [str(tmp_path / 'mine.py')]


def write_run(workdir: Path, name: str, extension: Path) -> None:
  config = config_lib.get_config()
  config.router.score = name
  workdir.mkdir()
  (workdir / 'config.json').write_text(saved.to_json(config))
  record = {'extensions': [str(extension)]}
  (workdir / 'run.json').write_text(json.dumps(record))


def test_a_run_brings_the_code_that_it_was_made_with(tmp_path: Path) -> None:
  path = tmp_path / 'mine.py'
  path.write_text(MINE.format(name='of_a_run'))
  write_run(tmp_path / 'run', 'of_a_run', path)
  config = loading.of_run(str(tmp_path / 'run'))
  config_lib.validate(config, 1)
  first = GATES['of_a_run']
  loading.of_run(str(tmp_path / 'run'))
  assert GATES['of_a_run'] is first  # the file is run once


def test_code_that_is_gone_or_fails_is_named(tmp_path: Path) -> None:
  path = tmp_path / 'mine.py'
  write_run(tmp_path / 'run', 'gone', path)
  with pytest.raises(UserError, match=r'run\.json says that .*mine\.py'):
    loading.of_run(str(tmp_path / 'run'))
  path.write_text('1 / 0\n')
  with pytest.raises(UserError, match=r'mine\.py: ZeroDivisionError'):
    loading.of_run(str(tmp_path / 'run'))


def test_configs_can_be_imported_outside_of_a_clone(tmp_path: Path) -> None:
  (tmp_path / 'mine.py').write_text(
    'from configs import rmoe\n\nget_config = rmoe.get_config\n'
  )
  code = "from moe_jax.config import loading as l; l.load('mine.py:sft')"
  subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(user_code.PACKAGE.parent)},
    check=True,
  )


@pytest.mark.parametrize('place', ['run/mine.py', 'run/sub/mine.py', 'link.py'])
def test_code_that_came_with_a_run_is_not_run(
  place: str, tmp_path: Path
) -> None:
  """A stranger's workdir would choose what runs here."""
  write_run(tmp_path / 'run', 'stranger', tmp_path / place)
  (tmp_path / 'run' / 'sub').mkdir()
  (tmp_path / 'link.py').symlink_to('run/mine.py')
  with pytest.raises(UserError, match='came with the workdir, and it is not'):
    loading.of_run(str(tmp_path / 'run'))
  record = {'extensions': ['run/mine.py']}
  (tmp_path / 'run' / 'run.json').write_text(json.dumps(record))
  with pytest.raises(UserError, match='came with the workdir, and it is not'):
    loading.load(str(tmp_path / 'run' / 'config.json'))


def test_a_saved_config_allows_no_community(tmp_path: Path) -> None:
  """It may be a stranger's; a file in Python and a flag are the user's own."""
  config = config_lib.get_config()
  config.data.allow_community = True
  workdir = tmp_path / 'run'
  workdir.mkdir()
  (workdir / 'config.json').write_text(saved.to_json(config))
  assert not loading.of_run(str(workdir)).data.allow_community
  assert not loading.load(f'{workdir}/config.json').data.allow_community
  flag = '--config.data.allow_community=True'
  allowed, _ = cli.parse(['prog', f'--workdir={workdir}', flag])
  assert allowed.data.allow_community
  assert loading.load('base').data.allow_community is False
  assert not saved.changed_meaning(
    config.to_dict(), config_lib.get_config().to_dict()
  )


def test_a_run_has_its_copy_of_a_tokenizer_that_is_another_now(
  tmp_path: Path,
) -> None:
  named, workdir = tmp_path / 'named.json', tmp_path / 'run'
  config = config_lib.get_config()
  config.data.tokenizer = str(named)
  workdir.mkdir()
  (workdir / 'config.json').write_text(saved.to_json(config))
  (workdir / 'other.json').write_text(saved.to_json(config))

  def tokenizer(name: str = 'config.json') -> str:
    return loading.load(str(workdir / name)).data.tokenizer

  assert tokenizer() == str(named)  # which is told when it is read
  kept = workdir / 'tokenizer.json'
  kept.write_text('{"a": 1}')
  assert tokenizer() == str(kept)
  named.write_text('{"a": 1}')
  assert tokenizer() == str(named)
  named.write_text('{"a": 2}')
  assert tokenizer() == str(kept)
  assert tokenizer('other.json') == str(named)  # no run's own
  named.unlink()
  os.mkfifo(named)
  assert tokenizer() == str(kept)


@pytest.mark.parametrize('text', ['[' * 10**5, '{"a":' * 900 + '1' + '}' * 900])
def test_a_config_that_is_nested_too_deeply(text: str, tmp_path: Path) -> None:
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match='config.json is not the JSON of'):
    loading.of_run(str(tmp_path))


@pytest.mark.parametrize('text', ['[1]', '{"extensions": 3}', '[' * 10**5])
def test_a_record_that_is_none(text: str, tmp_path: Path) -> None:
  (tmp_path / 'config.json').write_text(saved.to_json(config_lib.get_config()))
  (tmp_path / 'run.json').write_text(text)
  with pytest.raises(UserError, match='run.json cannot be read'):
    loading.of_run(str(tmp_path))


def test_a_config_that_is_a_pipe(tmp_path: Path) -> None:
  os.mkfifo(tmp_path / 'config.json')
  with pytest.raises(UserError, match='there is no file or preset'):
    loading.load(str(tmp_path / 'config.json'))
  assert not loading.holds_run(str(tmp_path))
  with pytest.raises(UserError, match='Not a regular file'):
    loading.of_run(str(tmp_path))
