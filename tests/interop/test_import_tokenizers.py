"""The tokenizer that lies in the folder of an imported checkpoint."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from moe_jax.config import saved
from moe_jax.data import subwords
from moe_jax.errors import UserError
from moe_jax.interop import (
  checkpoint,
  convert,
  formats,
  released,
  tokenizer_files,
  verify,
)
from tests.helpers import tiny, vocabularies
from tests.helpers.released import export, random_params

FILES = {'bpe': 'tokenizer.json', 'unigram': 'tokenizer.model'}


@pytest.fixture
def unmade(monkeypatch: pytest.MonkeyPatch) -> None:
  """Imports write a config and no model, whose vocabulary has any size."""

  def write(workdir: Path, config: ConfigDict, params: object) -> None:
    del params
    workdir.mkdir()
    (workdir / 'config.json').write_text(saved.to_json(config))

  monkeypatch.setattr(
    released, 'load', lambda folder: (formats.read(folder)[1], {})
  )
  monkeypatch.setattr(checkpoint, 'write_run', write)
  monkeypatch.setattr(
    checkpoint, 'read_run', lambda _: checkpoint.Checkpoint(ConfigDict(), {}, 0)
  )
  monkeypatch.setattr(verify, 'assert_equal', lambda *_: 'equal')


def imported(folder: Path, tokenizer: str | None = None) -> tuple[str, str]:
  """The tokenizer of the run that is made, and what is told of it."""
  workdir = folder.parent / 'w'
  said = convert.import_(folder, workdir, tokenizer)
  config = json.loads((workdir / 'config.json').read_text())
  return config['data']['tokenizer'], said.partition('\n')[2]


@pytest.mark.parametrize('kind', FILES)
def test_the_run_keeps_it_and_an_export_has_it(
  kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  # Other tests compare the logits, for which four models are compiled.
  monkeypatch.setattr(verify, 'assert_equal', lambda *_: 'equal')
  folder, workdir, out = (tmp_path / name for name in ('folder', 'w', 'out'))
  folder.mkdir()
  config = tiny.config(
    **{
      'model.vocab_size': 400,
      'model.num_layers': 1,
      'router.weights': 'chosen',
    }
  )
  export(folder, config, random_params(config), 'mixtral')
  name, content = FILES[kind], vocabularies.content(kind)
  path, size = folder / name, vocabularies.SIZES[kind]
  path.write_bytes(content)
  assert imported(folder) == (
    str(path),
    f"  data.tokenizer = '{path}': {path} has {size} ids and the model 400",
  )
  assert (workdir / name).read_bytes() == content
  assert checkpoint.vocabulary(workdir) == hashlib.sha256(content).hexdigest()
  shutil.rmtree(folder)
  convert.export(workdir, out, 'mixtral', 'float32', 0, None)
  assert (out / name).read_bytes() == content


@pytest.mark.usefixtures('unmade')
@pytest.mark.parametrize(('kind', 'name'), FILES.items())
def test_it_may_have_fewer_ids_than_the_model(
  kind: str, name: str, copy: Callable[..., Path]
) -> None:
  folder, size = copy('cartesian', vocab_size=400), vocabularies.SIZES[kind]
  (folder / name).write_bytes(vocabularies.content(kind))
  tokenizer, told = imported(folder)
  assert tokenizer == str(folder / name)
  assert told.endswith(f'{name} has {size} ids and the model 400')


@pytest.mark.parametrize(('kind', 'name'), FILES.items())
def test_it_may_not_have_more(
  kind: str, name: str, copy: Callable[..., Path], tmp_path: Path
) -> None:
  folder, size = copy('cartesian'), vocabularies.SIZES[kind]
  (folder / name).write_bytes(vocabularies.content(kind))
  with pytest.raises(
    UserError, match=f'{name} has {size} ids and the model 97'
  ):
    imported(folder)
  assert list(tmp_path.iterdir()) == [folder]


def test_an_end_of_documents_that_it_lacks_is_counted(
  copy: Callable[..., Path],
) -> None:
  folder = copy('cartesian')
  path = Path(vocabularies.of_size(folder / 'tokenizer.json', 97))
  path.write_text(path.read_text().replace('</s>', 'other'))
  with pytest.raises(UserError, match=r'98 ids, counting the <\|endoftext\|>'):
    imported(folder)


@pytest.mark.usefixtures('unmade')
def test_the_users_own_goes_before_it(
  copy: Callable[..., Path], tmp_path: Path
) -> None:
  folder = copy('cartesian')
  (folder / 'tokenizer.json').write_text('{')
  own = vocabularies.of_size(tmp_path / 'own.json', 97)
  assert imported(folder, own) == (own, '')
  shutil.rmtree(tmp_path / 'w')
  tokenizer, told = imported(folder, 'bytes')
  assert tokenizer == 'bytes' and 'has 257 ids and the model 97' in told


@pytest.mark.usefixtures('unmade')
def test_what_bytes_are_exported_as_is_bytes(
  copy: Callable[..., Path],
) -> None:
  folder = copy('cartesian', vocab_size=257)
  path = folder / 'tokenizer.json'
  path.write_bytes(tokenizer_files.of_bytes())
  tokenizer, told = imported(folder)
  assert tokenizer == 'bytes'
  assert told.endswith(f"'bytes': {path} has 257 ids and the model 257")


def test_of_both_files_it_is_the_one_that_transformers_reads(
  tmp_path: Path,
) -> None:
  for kind, name in FILES.items():
    (tmp_path / name).write_bytes(vocabularies.content(kind))
  read = tokenizer_files.read(tmp_path)
  assert isinstance(read, subwords.HuggingFaceTokenizer)


def damaged(path: Path) -> None:
  path.write_text('version https://git-lfs.github.com/spec/v1\n')


def nowhere(path: Path) -> None:
  path.symlink_to('gone')


@pytest.mark.parametrize('name', FILES.values())
@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (damaged, 'is damaged, or no'),
    (nowhere, 'cannot be read: No such file'),
    (os.mkfifo, 'cannot be read: Not a regular file'),
  ],
)
def test_a_file_that_is_no_tokenizer_is_one_line(
  make: Callable[[Path], None],
  message: str,
  name: str,
  copy: Callable[..., Path],
) -> None:
  folder = copy('cartesian')
  make(folder / name)
  with pytest.raises(UserError, match=message) as caught:
    imported(folder)
  said = str(caught.value)
  assert str(folder / name) in said and said.endswith(
    '--tokenizer names another'
  )
  assert '\n' not in said
