"""A data set and a tokenizer of a user's own, from their config file."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_jax.config import loading
from moe_jax.data import sources, tokenizers
from moe_jax.data.token_cache import TokenCache
from moe_jax.errors import UserError
from moe_jax.registry import DATA_SOURCES, TOKENIZERS
from tests.helpers import registries, runs

OWN = """
import numpy as np

from moe_jax import config as config_lib
from moe_jax.data.sources import DATA_SOURCES, GivenTexts
from moe_jax.data.tokenizers import TOKENIZERS

TEXTS = {'train': ['to be or not to be '] * 60, 'validation': ['or be '] * 20}


@DATA_SOURCES.register('lines')
def lines(data, **options):
  return GivenTexts(TEXTS, key='lines-1', **options)


@TOKENIZERS.register('letters')
class Letters:
  name = 'letters'
  letters = 'benort '
  vocab_size = 8
  eos_id = 7
  fingerprint = 'letters 1'

  def __init__(self, data):
    del data

  def encode(self, text):
    return np.array([self.letters.index(c) for c in text], np.int32)

  def decode(self, ids):
    return ''.join(self.letters[i] for i in ids if i != self.eos_id)


def get_config():
  config = config_lib.get_config()
  config.data.name, config.data.tokenizer = 'lines', 'letters'
  return config
"""
TINY = {
  'model.num_layers': 1,
  'model.hidden_size': 16,
  'model.ffn_width': 16,
  'moe.num_experts': 0,
  'data.seq_len': 16,
  'train.batch_size': 8,
  'train.steps': 2,
  'train.log_every': 1,
  'optimizer.decay_steps': 4,
  'optimizer.warmup_steps': 1,
  'checkpoint.every': 2,
  'eval.every': 0,
}


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
  registries.forget(monkeypatch, DATA_SOURCES, TOKENIZERS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
  path = tmp_path / 'own.py'
  path.write_text(OWN)
  return path


def tokens_of_a_resumed_run(start: list[str], workdir: Path) -> int:
  """Trains, goes on to step 4 and evaluates; returns the tokens of that."""
  assert runs.call('train.py', start) == 0
  again = [f'--workdir={workdir}', '--config.train.steps=4']
  assert runs.call('train.py', again) == 0
  assert runs.checkpoints(workdir)[-1] == 4
  assert runs.call('eval.py', [f'--workdir={workdir}']) == 0
  [found] = (workdir / 'evaluation').iterdir()
  return runs.read_json(found)['tokens']


@pytest.mark.slow
def test_trains_resumes_and_evaluates(file: Path, tmp_path: Path) -> None:
  workdir = tmp_path / 'run'
  flags = [f'--config.{key}={value}' for key, value in TINY.items()]
  start = [f'--config={file}', f'--workdir={workdir}', *flags]
  start.append(f'--config.data.dir={tmp_path / "prepared"}')
  # Every letter, and the ends of documents.
  assert tokens_of_a_resumed_run(start, workdir) == 20 * 6 + 20


@pytest.mark.slow
def test_trains_on_packed_rows_and_resumes(tmp_path: Path) -> None:
  folder, workdir = tmp_path / 'rows', tmp_path / 'run'
  for split, count in (('train', 60), ('validation', 20)):
    (folder / split).mkdir(parents=True)
    rows = [json.dumps({'body': f'caf\xe9 {i}'}) for i in range(count)]
    content = gzip.compress('\n'.join(rows).encode())
    (folder / split / 'a.jsonl.gz').write_bytes(content)
  keys = TINY | {
    'data.name': 'files',
    'data.path': folder,
    'data.text_key': 'body',
    'data.dir': tmp_path / 'prepared',
  }
  flags = [f'--config.{key}={value}' for key, value in keys.items()]
  start = ['--config=base', f'--workdir={workdir}', *flags]
  # Bytes of ten texts of one figure and ten of two, and the ends of documents.
  assert tokens_of_a_resumed_run(start, workdir) == 10 * 7 + 10 * 8 + 20


def opened(file: Path, tmp_path: Path) -> tuple[Any, Any]:
  """The validation texts and the tokenizer of the file."""
  config = loading.load(str(file))
  config.data.dir = str(tmp_path / 'prepared')
  documents = sources.open_documents(config.data, 'validation')
  return documents, tokenizers.build(config.data)


def test_texts_come_back(file: Path, tmp_path: Path) -> None:
  documents, tokenizer = opened(file, tmp_path)
  texts = [documents[i] for i in range(len(documents))]
  assert texts == ['or be '] * 20
  for text in texts:
    assert tokenizer.decode(tokenizer.encode(text)) == text
  lengths = TokenCache.open(documents, tokenizer).lengths
  np.testing.assert_array_equal(lengths, [[6, 6]] * 20)


def test_ids_that_the_model_would_not_have_are_refused(
  file: Path, tmp_path: Path
) -> None:
  documents, tokenizer = opened(file, tmp_path)
  tokenizer.vocab_size = 6
  with pytest.raises(UserError, match="'letters' makes ids from 0 to 6"):
    TokenCache.open(documents, tokenizer)


def test_another_fingerprint_encodes_anew(file: Path, tmp_path: Path) -> None:
  documents, tokenizer = opened(file, tmp_path)
  TokenCache.open(documents, tokenizer)
  tokenizer.fingerprint = 'letters 2'
  tokenizer.encode = lambda text: np.zeros(3, np.int32)
  assert (TokenCache.open(documents, tokenizer).lengths[:, 0] == 3).all()


def test_every_name_is_known(tmp_path: Path) -> None:
  assert set(TOKENIZERS) == {'bytes', 'enwik8', 'words'}
  assert {'python_stdlib', 'text_folder', 'files'} <= set(DATA_SOURCES)
  assert all(callable(DATA_SOURCES[name]) for name in DATA_SOURCES)
  assert all(callable(TOKENIZERS[name]) for name in TOKENIZERS)
