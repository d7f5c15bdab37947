"""What commands refuse before they read a model, and what they say of it."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.errors import RetryableError, UserError
from moe_jax.interop import (
  checkpoint,
  convert,
  formats,
  released,
  safetensors,
  upcycle,
  verify,
)
from moe_jax.interop import cli as interop_cli
from tests.helpers import tiny
from tests.helpers.released import RELEASED


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
  """Fails as soon as more than a config would be read."""

  def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError('a model was read')

  monkeypatch.setattr(formats, 'read', lambda directory: ('rmoe', None))
  monkeypatch.setattr(checkpoint, 'run_config', lambda workdir: None)
  for module, name in (
    (released, 'load'),
    (checkpoint, 'read_run'),
    (checkpoint, 'initial_params'),
  ):
    monkeypatch.setattr(module, name, refuse)


def commands(target: Path) -> list[Callable[[], str]]:
  """Every command that writes, to `target`."""
  nowhere = Path('nowhere')
  return [
    lambda: convert.import_(nowhere, target, 'bytes'),
    lambda: convert.export(nowhere, target, None, 'float32', 0, None),
    lambda: convert.upcycle(nowhere, tiny.config(), target),
  ]


@pytest.mark.usefixtures('unread')
def test_the_target_is_checked_first(tmp_path: Path) -> None:
  (tmp_path / 'full' / 'x').mkdir(parents=True)
  (tmp_path / 'file').write_text('')
  for run_it in commands(tmp_path / 'full') + commands(tmp_path / 'file'):
    with pytest.raises(UserError, match='is there already; name a new folder'):
      run_it()
  for run_it in commands(tmp_path / 'file' / 'below'):
    with pytest.raises(UserError, match='below cannot be written: Not a dir'):
      run_it()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'full']


@pytest.mark.usefixtures('unread')
@pytest.mark.parametrize('name', ['exists', 'iterdir'])
def test_a_target_that_cannot_be_looked_at(
  name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def refuse(self: Path) -> None:
    raise PermissionError(13, 'Permission denied')

  [first, *_] = commands(tmp_path)
  monkeypatch.setattr(Path, name, refuse)
  with pytest.raises(UserError, match='cannot be written: Permission denied'):
    first()


def test_what_cannot_be_read_is_not_said_of_the_target(tmp_path: Path) -> None:
  with (
    pytest.raises(OSError, match='of the source'),
    convert.output_dir(tmp_path / 'w'),
  ):
    raise OSError(5, 'of the source')
  assert not list(tmp_path.iterdir())
  with (
    pytest.raises(UserError, match='w cannot be written: No such file'),
    convert.output_dir(tmp_path / 'w'),
  ):
    pass  # nothing was made to be moved there


def test_a_folder_that_cannot_be_looked_into(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def refuse(self: Path) -> None:
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(Path, 'is_file', refuse)
  with pytest.raises(UserError, match='cannot be read: Permission denied'):
    checkpoint.read_run(tmp_path)
  with pytest.raises(UserError, match='cannot be read: Permission denied'):
    convert.upcycle(tmp_path, tiny.config(), tmp_path / 'w')


@pytest.mark.usefixtures('unread')
def test_a_tokenizer_that_there_is_not(tmp_path: Path) -> None:
  with pytest.raises(UserError, match="--tokenizer = 'byte' is not known; did"):
    convert.import_(RELEASED / 'cartesian', tmp_path / 'w', 'byte')


def test_a_tokenizer_that_cannot_be_the_models() -> None:
  config = tiny.config(**{'model.vocab_size': 97})
  said = checkpoint.other_ids(config)
  assert "data.tokenizer = 'bytes' has 257 ids and the model 97" in said
  for tokenizer, size in (('bytes', 257), ('enwik8', 97), ('words', 97)):
    config.data.tokenizer, config.model.vocab_size = tokenizer, size
    assert checkpoint.other_ids(config) == ''


@pytest.mark.parametrize('command', ['export', 'verify'])
def test_arguments_in_the_wrong_order(command: str, tmp_path: Path) -> None:
  """Even where the second is there, as swapped arguments are."""
  (tmp_path / 'x').mkdir()
  (tmp_path / 'x' / 'config.json').write_text('{}')
  more = {'export': (None, 'float32', 0, None), 'verify': ('float32', None)}
  with pytest.raises(UserError, match='of a released .* the workdir first'):
    getattr(convert, command)(
      RELEASED / 'rmoe_gru', tmp_path / 'x', *more[command]
    )


def test_a_negative_size_of_shards(tmp_path: Path) -> None:
  with pytest.raises(UserError, match='--max-shard-bytes = -5 must be'):
    safetensors.write(tmp_path, {'a': np.zeros(2, 'f4')}, -5)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('shards', [0, 8000])
def test_a_full_disk_is_one_line(shards: int, tmp_path: Path) -> None:
  """safetensors has an error of its own for it."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  tensors = {name: np.zeros(2000, 'f4') for name in 'ab'}
  with pytest.raises(RetryableError, match='out cannot .*too large.*make room'):
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
      with convert.writing(tmp_path / 'out'):
        safetensors.write(tmp_path, tensors, shards)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_export_that_the_release_cannot_run_says_so(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = tiny.config(
    **{'model.vocab_size': 61, 'router.recurrent': 'gru', 'moe.first_dense': 1}
  )
  monkeypatch.setattr(checkpoint, 'run_config', lambda *_: config)
  monkeypatch.setattr(
    checkpoint, 'read_run', lambda *_: checkpoint.Checkpoint(config, {}, 3)
  )
  monkeypatch.setattr(released, 'save', lambda *_, **__: None)
  monkeypatch.setattr(released, 'load', lambda *_: None)
  monkeypatch.setattr(verify, 'assert_equal', lambda *_: 'equal')
  said = convert.export(tmp_path, tmp_path / 'x', None, 'float32', 0, None)
  [first, of_tokenizer, second] = said.splitlines()
  assert "no tokenizer is written: data.tokenizer = 'bytes'" in of_tokenizer
  assert "in the format 'rmoe'" in first and 'the tensors only' in second


def test_an_exact_start_that_is_not_is_no_bug_of_the_user(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Both numbers are named, and nothing is made."""
  config = tiny.config(**{'model.vocab_size': 61})
  model = (config, {})
  monkeypatch.setattr(
    checkpoint, 'read', lambda dense: checkpoint.Checkpoint(*model, 0)
  )
  monkeypatch.setattr(checkpoint, 'is_run', lambda dense: False)
  monkeypatch.setattr(checkpoint, 'initial_params', lambda whole: {})
  monkeypatch.setattr(upcycle, 'upcycle', lambda *_: {})
  monkeypatch.setattr(upcycle, 'inexact', lambda *_: [])
  for difference in (3e-3, float('nan')):
    monkeypatch.setattr(verify, 'difference', lambda *_, d=difference: d)
    with pytest.raises(UserError, match=rf'by {difference:.1e} .* 1\.0e-05'):
      convert.upcycle(tmp_path, config, tmp_path / 'w')
  assert not list(tmp_path.iterdir())


def test_rounding_grows_with_depth() -> None:
  shallow, deep = tiny.config(), tiny.config(**{'model.num_layers': 96})
  assert verify.rounding(shallow) == verify.TOLERANCE
  # 96 x sqrt(48) x 2^-23
  np.testing.assert_allclose(verify.rounding(deep), 7.9287e-5, rtol=1e-3)


@pytest.mark.usefixtures('unread')
def test_a_workdir_whose_path_is_a_pattern(tmp_path: Path) -> None:
  """Orbax would lose the checkpoint there; an export is no business of its."""
  target = tmp_path / 'exp[1]' / 'w'
  first, export, last = commands(target)
  for run_it in (first, last):
    with pytest.raises(UserError, match='has one of the characters'):
      run_it()
  with pytest.raises(AssertionError, match='a model was read'):
    export()
  assert not list(tmp_path.iterdir())


def test_home_is_expanded(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  monkeypatch.setenv('HOME', str(tmp_path))
  for command in ('import', 'export', 'verify'):
    with pytest.raises(SystemExit):
      interop_cli.main([command, '~/a', '~/b'])
    assert f'error: {tmp_path}/a' in capsys.readouterr().err
