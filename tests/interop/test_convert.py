"""The commands, from a shell: what they write, say and refuse."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.interop import checkpoint, convert, hf, released
from tests.helpers import tiny
from tests.helpers.released import RELEASED, random_params, save

ROOT = Path(__file__).parents[2]


def run(*arguments: Any) -> tuple[int, str, str]:
  """Exit status, stdout and stderr of `moe_jax convert`."""
  done = subprocess.run(
    [sys.executable, '-m', 'moe_jax', 'convert', *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout, done.stderr


def errors(*arguments: Any) -> str:
  """What a failing command says: one line, with exit status 2."""
  status, out, err = run(*arguments)
  lines = [line for line in err.splitlines() if line.startswith('error: ')]
  assert (status, out, len(lines)) == (2, '', 1), err
  assert 'Traceback' not in err
  return lines[0]


@pytest.fixture(scope='module')
def import_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
  workdir = tmp_path_factory.mktemp('imported') / 'run'
  said = convert.import_(RELEASED / 'cartesian', workdir, None)
  return workdir, said


@pytest.fixture
def imported(import_once: tuple[Path, str]) -> Path:
  return import_once[0]


@pytest.fixture
def imported_said(import_once: tuple[Path, str]) -> str:
  return import_once[1]


@pytest.mark.slow
def test_there_and_back(tmp_path: Path) -> None:
  source, run_dir, out = RELEASED / 'rmoe_gru', tmp_path / 'w', tmp_path / 'out'
  status, said, _ = run('import', source, run_dir)
  assert status == 0 and 'logits equal to 0.0e+00' in said
  status, said, _ = run('export', run_dir, out, '--max-shard-bytes=150000')
  assert status == 0 and "in the format 'rmoe'" in said
  assert (out / 'model.safetensors.index.json').exists()
  ids = np.random.default_rng(0).integers(97, size=(2, 7))
  np.testing.assert_array_equal(hf.logits(out, ids), hf.logits(source, ids))
  assert run('verify', run_dir, out)[0] == 0
  tensors = load_file(source / 'model.safetensors')
  tensors['model.layers.1.block_sparse_moe.weight2'] *= 1.01
  shutil.copytree(source, tmp_path / 'other')
  save(tmp_path / 'other', tensors)
  assert 'the models differ' in errors('verify', run_dir, tmp_path / 'other')


def test_an_imported_workdir_has_every_key(imported: Path) -> None:
  config = json.loads((imported / 'config.json').read_text())
  schema = config_lib.get_config().to_dict()
  assert config_lib.flatten(config).keys() == (
    config_lib.flatten(schema).keys()
  )
  assert config['data']['seq_len'] == 64  # its max_position_embeddings
  assert config['moe']['factors'] == 2
  assert config['loss']['balance_layers'] == 'joined'
  assert sorted(path.name for path in imported.parent.iterdir()) == ['run']
  _, params, step, _ = checkpoint.read_run(imported, None)
  assert step == 0
  theirs = load_file(RELEASED / 'cartesian' / 'model.safetensors')
  ours = params['embed_VD']
  np.testing.assert_array_equal(ours, theirs['model.embed_tokens.weight'])


def test_what_is_there_is_not_overwritten(imported: Path) -> None:
  with pytest.raises(UserError, match='is there already; name a new folder'):
    convert.import_(RELEASED / 'cartesian', imported, 'bytes')


def test_an_import_says_whose_ids_they_are(imported_said: str) -> None:
  assert 'has 257 ids and the model 97' in imported_said


def test_configs_are_left_as_they_were() -> None:
  """What a run is made with must be what its workdir says."""
  config = tiny.config(**{'model.dtype': 'auto', 'moe.dispatch': 'capacity'})
  before = config.to_dict()
  whole = checkpoint.with_vocab_size(config.lock())
  assert whole.model.vocab_size == 257 and whole.is_locked
  released.abstract(config)
  released.abstract(whole)
  assert config.to_dict() == before
  assert whole.model.dtype == 'auto' and whole.moe.dispatch == 'capacity'


def test_a_failed_export_leaves_nothing(imported: Path) -> None:
  with pytest.raises(UserError, match='experts in every layer'):
    convert.export(imported, imported.parent / 'x', 'mixtral', 'float32', 0, 0)
  assert [path.name for path in imported.parent.iterdir()] == ['run']


def test_what_a_dtype_cannot_hold_is_named(tmp_path: Path) -> None:
  folder = tmp_path / 'big'
  shutil.copytree(RELEASED / 'rmoe_gru', folder)
  tensors = load_file(folder / 'model.safetensors')
  tensors['model.norm.weight'][3] = 1e5
  save(folder, tensors)
  config, params = hf.load(folder)
  with pytest.raises(UserError, match=r'model.norm.weight, .* 100000'):
    hf.save(
      tmp_path,
      config,
      params,
      'rmoe',
      max_positions=8,
      dtype='float16',
      max_shard_bytes=0,
    )


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'arguments are required: COMMAND'),
    (['imprt', 'a', 'b'], "'imprt'.*import"),
    (['import', 'nowhere', 'b'], 'nowhere/config.json cannot be read'),
    (['export', 'nowhere', 'b'], 'nowhere is not the workdir of a run'),
    (['export', 'a', 'b', '--max-shard-bytes=-5'], "'-5' is no number of"),
    (['verify', RELEASED / 'rmoe_gru', 'b'], 'the workdir first and the'),
    (['export', 'a', 'b', '--dtype=int8'], "--dtype: .*'int8'.*float16"),
  ],
)
@pytest.mark.slow
def test_mistakes_on_the_command_line(arguments: list, message: str) -> None:
  assert re.search(message, errors(*arguments))


@pytest.mark.slow
def test_upcycling_a_llama(tmp_path: Path) -> None:
  keys = {
    'model_type': 'llama',
    'vocab_size': 300,
    'hidden_size': 32,
    'intermediate_size': 40,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'rope_parameters': {'rope_theta': 500.0, 'rope_type': 'default'},
  }
  config = tiny.config(
    **{
      'model.vocab_size': 300,
      'model.ffn_width': 40,
      'model.rope_theta': 500.0,
      'moe.num_experts': 0,
    }
  )
  save(tmp_path, hf.to_released(random_params(config), config, 'llama'))
  (tmp_path / 'config.json').write_text(json.dumps(keys))
  with pytest.raises(UserError, match='an ordinary Llama, .*upcycle'):
    hf.load(tmp_path)

  path = ROOT / 'configs' / 'quickstart.py'
  flags = [
    f'--config.model.{key}={config.model[key]}'
    for key in 'num_layers hidden_size num_heads num_kv_heads vocab_size '
    'rope_theta'.split()
  ]
  status, said, err = run(
    'upcycle',
    f'--dense={tmp_path}',
    f'--config={path}',
    f'--workdir={tmp_path / "w"}',
    '--config.model.head_dim=0',
    '--config.moe.expert_width=40',
    '--config.router.recurrent=none',
    '--config.moe.factors=1',
    '--config.moe.shared.width=0',
    *flags,
  )
  assert status == 0, err
  assert 'starts as exactly the model' in said
  assert 'checkpoints' in [p.name for p in (tmp_path / 'w').iterdir()]
  saved = json.loads((tmp_path / 'w' / 'config.json').read_text())
  assert saved['model']['dtype'] == 'auto'  # though the proof is in float32


@pytest.mark.parametrize(
  ('text', 'message'),
  [('{"seed": 0, ', 'is not JSON'), ('{"sed": 0}', "no config key 'sed'")],
)
def test_the_config_of_a_run_is_checked(
  text: str, message: str, tmp_path: Path
) -> None:
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match=message):
    checkpoint.read_run(tmp_path)


# The run's router, --format, and who is said to run what is written.
SERVED = {
  'rmoe': (
    {'router.recurrent': 'gru'},
    None,
    ["RMoE's released code runs it, its cell repaired; transformers and vLLM"],
  ),
  'cartesian': (
    {'moe.factors': 2},
    None,
    ["CartesianMoE's repository runs it", 'a Llama without experts'],
  ),
  'linear': (
    {},
    None,
    ['code runs it; tr', 'what --format=mixtral writes'],
  ),
  'mixtral': ({}, 'mixtral', ['transformers and vLLM run it, as a Mixtral']),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', SERVED)
def test_an_export_is_ready_to_be_served(name: str, tmp_path: Path) -> None:
  """The ids of config.json are the tokenizer's, and who runs it is said."""
  changes, format, fragments = SERVED[name]
  sizes = {'model.num_layers': 1, 'model.vocab_size': 257}
  config = tiny.config(**sizes | changes)
  params = checkpoint.initial_params(config)
  checkpoint.write_run(tmp_path / 'run', config, params)
  out = tmp_path / 'out'
  said = convert.export(tmp_path / 'run', out, format, 'float32', 0, None)
  for fragment in fragments:
    assert fragment in said
  written = {path.name for path in out.iterdir()}
  assert written == {
    'config.json',
    'generation_config.json',
    'model.safetensors',
    'tokenizer.json',
    'tokenizer_config.json',
  }
  values = json.loads((out / 'config.json').read_text())
  assert values['torch_dtype'] == 'float32'
  assert values['max_position_embeddings'] == config.data.seq_len
  for key in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
    assert values[key] == 256


@pytest.mark.slow
def test_what_nobody_else_runs_is_said(tmp_path: Path) -> None:
  config = tiny.config(**{'moe.factors': 2, 'router.recurrent': 'gru'})
  params = checkpoint.initial_params(config)
  checkpoint.write_run(tmp_path / 'run', config, params)
  with pytest.raises(UserError, match='nothing but moe_jax runs it'):
    convert.export(tmp_path / 'run', tmp_path / 'out', None, 'float32', 0, None)
