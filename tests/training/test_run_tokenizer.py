"""A run keeps its tokenizer, and no other takes its place."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax import pretrained
from moe_jax.analysis import analyze
from moe_jax.config import loading
from moe_jax.data import folders
from moe_jax.errors import UserError
from moe_jax.interop import checkpoint, convert
from moe_jax.planning import plan
from moe_jax.programs import doctor
from moe_jax.training import loop, run_tokenizer
from tests.helpers import runs, tiny, vocabularies

pytestmark = pytest.mark.slow


def with_values(config: ConfigDict, **data: str) -> ConfigDict:
  made = config.copy_and_resolve_references()
  made.data.update(data)
  return made


@pytest.fixture(scope='module')
def trained(
  tmp_path_factory: pytest.TempPathFactory,
) -> tuple[ConfigDict, Path]:
  """The config of a run, whose vocabulary is padded, and its directory."""
  folder = tmp_path_factory.mktemp('run')
  texts = folder / 'texts'
  texts.mkdir()
  for i, text in enumerate(vocabularies.TEXTS):
    (texts / f'{i}.txt').write_text(text)
  assert {*map(folders.split_of, (p.name for p in texts.iterdir()))} >= {
    'train',
    'validation',
  }
  config = tiny.config(
    **{
      'model.num_layers': 1,
      'model.vocab_multiple': 64,
      'moe.num_experts': 2,
      'router.weights': 'chosen',
      'data.name': 'text_folder',
      'data.path': str(texts),
      'data.dir': str(folder / 'prepared'),
      'data.tokenizer': str(vocabularies.write(folder, 'bpe')),
      'train.steps': 1,
      'checkpoint.every': 1,
      'eval.every': 0,
    }
  )
  loop.train(config, str(folder / 'workdir'))
  return config, folder / 'workdir'


@pytest.fixture
def moved(
  trained: tuple[ConfigDict, Path], tmp_path: Path
) -> Iterator[tuple[ConfigDict, Path]]:
  """The same run, copied, whose tokenizer lies where a test may remove it."""
  config, workdir = trained
  shutil.copytree(workdir, tmp_path / 'copied')
  path = vocabularies.write(tmp_path, 'bpe')
  config = with_values(config, tokenizer=str(path))
  saved = json.loads((workdir / 'config.json').read_text())
  saved['data']['tokenizer'] = str(path)
  (tmp_path / 'copied' / 'config.json').write_text(json.dumps(saved))
  yield config, tmp_path / 'copied'


def other(folder: Path) -> str:
  """The path of another tokenizer of that kind, and of as many ids."""
  path = folder / 'other.json'
  text = vocabularies.content('bpe').decode()
  path.write_text(text.replace('"version": "1.0"', '"version":"1.0"'))
  assert path.read_text() != text
  return str(path)


def test_the_file_is_kept_as_it_is(trained: tuple[ConfigDict, Path]) -> None:
  config, workdir = trained
  content = vocabularies.content('bpe')
  assert (workdir / 'tokenizer.json').read_bytes() == content
  tokenizer = run_tokenizer.build(config, str(workdir))
  assert checkpoint.vocabulary(workdir) == tokenizer.fingerprint


def test_what_reads_a_run_reads_its_copy_where_the_file_is_gone(
  moved: tuple[ConfigDict, Path], tmp_path: Path
) -> None:
  config, workdir = moved
  there = runs.evaluate(config, workdir)
  Path(config.data.tokenizer).unlink()
  assert runs.evaluate(config, workdir) == there
  own = loading.of_run(str(workdir))
  assert runs.evaluate(own, workdir) == there
  assert plan.make(own, 1)['vocabulary'] == {'ids': 300, 'rows': 320}
  _, tokenizer, _ = pretrained.load(workdir)
  assert tokenizer is not None and tokenizer.name.startswith('huggingface-')
  analysis = analyze.analyze(config, str(workdir), tokens=64, passage=8)
  assert analysis['step'] == 1
  with pytest.raises(UserError, match='cannot be read: No such file'):
    loop.train(config, str(tmp_path / 'anew'))


def test_a_file_that_is_another_now_is_told_and_not_read(
  moved: tuple[ConfigDict, Path],
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  config, workdir = moved
  shutil.copy(other(tmp_path), config.data.tokenizer)
  tokenizer = run_tokenizer.build(config, str(workdir))
  assert tokenizer.fingerprint == checkpoint.vocabulary(workdir)
  told = capsys.readouterr().err
  assert tokenizer.name in told and 'reads its own copy' in told
  flags = ['doctor', f'--workdir={workdir}', '--data', '--json']
  monkeypatch.setattr(sys, 'argv', flags)
  doctor.run()
  out, told = capsys.readouterr()
  assert json.loads(out)[0]['tokenizer'] == tokenizer.name
  assert 'reads its own copy' in told


def test_another_file_of_the_same_content_is_the_same(
  moved: tuple[ConfigDict, Path], tmp_path: Path
) -> None:
  config, workdir = moved
  (tmp_path / 'elsewhere').mkdir()
  path = vocabularies.write(tmp_path / 'elsewhere', 'bpe')
  there = runs.evaluate(config, workdir)
  given = with_values(config, tokenizer=str(path))
  assert runs.evaluate(given, workdir) == there
  loop.train(given, str(workdir))  # which is done
  saved = json.loads((workdir / 'config.json').read_text())
  assert saved['data']['tokenizer'] == str(path)


def test_another_tokenizer_is_refused_with_both_named(
  moved: tuple[ConfigDict, Path], tmp_path: Path
) -> None:
  config, workdir = moved
  own = run_tokenizer.build(config, str(workdir))
  given = with_values(config, tokenizer=other(tmp_path))
  their = run_tokenizer.build(given, '')
  message = f'is {their.name}, and the run in {workdir} has {own.name}'
  with pytest.raises(UserError, match=message):
    runs.evaluate(given, workdir)
  with pytest.raises(UserError, match=message):
    loop.train(given, str(workdir))
  started = given.copy_and_resolve_references()
  started.train.init_from = str(workdir)
  digests = f'{own.fingerprint[:12]}, and .* is {their.fingerprint[:12]}'
  with pytest.raises(UserError, match=f'train.init_from: .*{digests}'):
    loop.train(started, str(tmp_path / 'started'))
  given = with_values(config, tokenizer='bytes')
  with pytest.raises(UserError, match=r"data\.tokenizer was .*now 'bytes'"):
    loop.train(given, str(workdir))


def test_a_copy_that_was_changed_is_refused(
  moved: tuple[ConfigDict, Path], tmp_path: Path
) -> None:
  config, workdir = moved
  shutil.copy(other(tmp_path), workdir / 'tokenizer.json')
  Path(config.data.tokenizer).unlink()
  with pytest.raises(UserError, match='its checkpoints are of the tokenizer'):
    runs.evaluate(config, workdir)
  with pytest.raises(UserError, match='its checkpoints are of the tokenizer'):
    convert.export(workdir, tmp_path / 'out', None, 'float32', 0, None)


def test_an_export_has_no_padding_and_the_tokenizer(
  moved: tuple[ConfigDict, Path], tmp_path: Path
) -> None:
  """The way out and back: a run of another padding computes the same."""
  config, workdir = moved
  Path(config.data.tokenizer).unlink()
  folder = tmp_path / 'exported'
  report = convert.export(workdir, folder, 'mixtral', 'float32', 0, None)
  assert 'tokenizer.json is what AutoTokenizer reads' in report
  values = runs.read_json(folder / 'config.json')
  assert values['vocab_size'] == 300
  assert 'equal' in convert.verify(workdir, folder, 'float32', None)
  kept = (folder / 'tokenizer.json').read_bytes()
  assert kept == vocabularies.content('bpe')

  imported = tmp_path / 'imported'
  convert.import_(folder, imported, None)
  shutil.rmtree(folder)
  ids = np.arange(300).reshape(2, 150)
  model, tokenizer, _ = pretrained.load(imported)
  assert tokenizer is not None
  theirs, _, _ = pretrained.load(workdir)
  assert model.logits(ids).shape == (2, 150, 300)
  np.testing.assert_allclose(model.logits(ids), theirs.logits(ids), atol=1e-5)
