"""A data set that gives its tokens other ids is not read by mistake."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from moe_jax.data import folders, vocabulary
from moe_jax.errors import UserError
from moe_jax.interop import checkpoint, convert
from moe_jax.training import loop
from tests.helpers import runs, tiny

VOCAB = 50  # more than there are words, so that shapes never tell
DENSE = {'moe.num_experts': 0, 'model.ffn_width': 24}


def name_of(split: str, nth: int) -> str:
  """The nth file name of a split."""
  names = (f'{i}.txt' for i in range(1000))
  return [name for name in names if folders.split_of(name) == split][nth]


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
  folder = tmp_path_factory.mktemp('words')
  for split in ('train', 'validation'):
    text = f'the words of a {split} text\n' * 40
    (folder / name_of(split, 0)).write_text(text)
  return tiny.config(
    **DENSE,
    **{
      'model.num_layers': 1,
      'model.vocab_size': VOCAB,
      'data.name': 'text_folder',
      'data.path': str(folder),
      'data.dir': str(tmp_path_factory.mktemp('prepared')),
      'data.tokenizer': 'words',
      'train.steps': 1,
      'checkpoint.every': 1,
      'eval.every': 0,
    },
  )


@pytest.fixture(scope='module')
def workdir(
  config: ConfigDict, tmp_path_factory: pytest.TempPathFactory
) -> Path:
  folder = tmp_path_factory.mktemp('runs') / 'run'
  loop.train(config, str(folder))
  return folder


@pytest.fixture
def copied(config: ConfigDict, tmp_path: Path) -> ConfigDict:
  """The config with a folder of its own, of the same texts."""
  path = tmp_path / 'texts'
  shutil.copytree(config.data.path, path)
  return with_values(config, path=str(path))


def with_values(config: ConfigDict, **data: str) -> ConfigDict:
  made = config.copy_and_resolve_references()
  made.data.update(data)
  return made


def add(config: ConfigDict) -> ConfigDict:
  """A file more."""
  path = os.path.join(config.data.path, name_of('train', 1))
  Path(path).write_text('some more words')
  return config


def edit(config: ConfigDict) -> ConfigDict:
  """As many words, and the same ones, in another order."""
  path = os.path.join(config.data.path, name_of('train', 0))
  Path(path).write_text('words the text of a train\n' * 40)
  return config


def another_feature(config: ConfigDict) -> ConfigDict:
  return with_values(config, text_key='name')


@pytest.mark.slow
@pytest.mark.parametrize('change', [add, edit, another_feature])
def test_other_ids_are_refused(
  change: Callable[[ConfigDict], ConfigDict],
  copied: ConfigDict,
  workdir: Path,
  tmp_path: Path,
) -> None:
  changed = change(copied)
  message = f'workdir {workdir}: its checkpoints are of another vocabulary'
  with pytest.raises(UserError, match=message):
    runs.evaluate(changed, workdir)
  started = changed.copy_and_resolve_references()
  started.train.init_from = str(workdir)
  with pytest.raises(UserError, match=f'train.init_from: {message}'):
    loop.train(started, str(tmp_path / 'started'))
  if change is not another_feature:  # which is another run by its config
    saved = (workdir / 'config.json').read_text()
    with pytest.raises(UserError, match=message):
      loop.train(changed, str(workdir))
    assert (workdir / 'config.json').read_text() == saved


@pytest.mark.slow
def test_the_same_texts_elsewhere_have_the_same_ids(
  config: ConfigDict, copied: ConfigDict, workdir: Path
) -> None:
  there, here = (runs.evaluate(each, workdir) for each in (config, copied))
  assert there == here


@pytest.mark.slow
def test_a_start_makes_its_tokenizer_once(
  config: ConfigDict, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  calls = []
  load = vocabulary.load_or_make

  def counted(*arguments: object) -> object:
    calls.append(arguments)
    return load(*arguments)

  monkeypatch.setattr(vocabulary, 'load_or_make', counted)
  made = config.copy_and_resolve_references()
  made.eval.every = 1
  prepared = loop.prepare(made)
  assert len(calls) == 1
  # Lines of six words and their end, between two separators.
  assert len(prepared.evaluations) == 1
  assert prepared.mixture.sequences[0].num_stream_tokens == 40 * 7 + 2
  runs.evaluate(config, workdir)
  assert len(calls) == 2


@pytest.mark.slow
def test_upcycling_keeps_the_dictionary(
  config: ConfigDict, workdir: Path, tmp_path: Path
) -> None:
  grown = config.copy_and_resolve_references()
  grown.moe.num_experts = 2
  upcycled = tmp_path / 'upcycled'
  convert.upcycle(workdir, grown, upcycled)
  kept = checkpoint.vocabulary(workdir)
  assert kept == loop.prepare(config).setup.vocabulary
  assert checkpoint.vocabulary(upcycled) == kept
