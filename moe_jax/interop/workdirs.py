"""Models in workdirs as training makes them: a config and its checkpoints."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.config import loading
from moe_jax.data import tokenizers
from moe_jax.errors import UserError, choose
from moe_jax.interop.released_keys import is_file, read_json
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training import state as state_lib
from moe_jax.training.checkpoint import Checkpointer


def check_tokenizer(name: str) -> None:
  """Refuses a `data.tokenizer` that there is not.

  Raises:
    UserError: as said.
  """
  choose('--tokenizer', name, tokenizers.NAMES)


def other_ids(config: ConfigDict) -> str:
  """Says that ids of `data.tokenizer` are not the model's, if they cannot be.

  Reads no data, so it believes a tokenizer that numbers the tokens of its data.
  """
  size = config.model.vocab_size
  of_tokenizer = tokenizers.vocab_size(config.data, size)
  if of_tokenizer == size:
    return ''
  return (
    f'\n  data.tokenizer = {config.data.tokenizer!r} has {of_tokenizer} ids and'
    f' the model {size}: its ids are of another tokenizer, so text evaluated'
    ' here is not what it was trained on'
  )


def full_config(
  sections: ConfigDict, tokenizer: str, seq_len: Any
) -> ConfigDict:
  """Every key of the schema: the model's from `sections`, others' defaults.

  Args:
    sections: as `released.load` returns them.
    tokenizer: `data.tokenizer`.
    seq_len: `data.seq_len`, unless it is no number of tokens.

  Raises:
    UserError: the config is not valid.
  """
  config = config_lib.get_config()
  with config.unlocked():
    for name in ('model', 'moe', 'router'):
      config[name].update(sections[name])
    config.model.dtype = 'auto'
    config.loss.balance_layers = sections.loss.balance_layers
    config.data.tokenizer = tokenizer
    if type(seq_len) is int and seq_len > 0:
      config.data.seq_len = seq_len
  config_lib.validate(config, 1)
  return config


def write(
  workdir: Path,
  config: ConfigDict,
  params: Mapping[str, Any],
  dictionary: str | None,
) -> None:
  """Makes a workdir whose checkpoint of step 0 holds `params`.

  Training goes on from there, with an optimizer that has seen nothing.

  Args:
    workdir: made here.
    config: of the run.
    params: of the model.
    dictionary: the digest of the one whose ids these know; None if unknown.
  """
  setup = _setup(with_vocabulary(config))
  placed = jax.tree.map(
    lambda leaf, made: jax.device_put(leaf, made.sharding),
    dict(params),
    setup.abstract['params'],
  )
  state = setup.init(placed)
  with Checkpointer.open(str(workdir), config, dictionary) as store:
    store.save(0, state, {'step': 0})


def read(
  workdir: Path, step: int | None
) -> tuple[ConfigDict, dict[str, Any], int]:
  """The config, the parameters and the step of a checkpoint.

  The config's `model.vocab_size` is never 0 here.

  Args:
    workdir: of a run.
    step: None for the newest.

  Raises:
    UserError: there is no such run or checkpoint.
  """
  with _opened(workdir) as (config, store):
    whole = with_vocabulary(config)
    step = store.latest_step() if step is None else step
    state, _ = store.restore({'params': _setup(whole).abstract['params']}, step)
  return whole, jax.tree.map(np.asarray, state['params']), step


def dictionary(workdir: Path) -> str | None:
  """The digest of the dictionary a run's ids are of, None if it says none.

  Raises:
    UserError: as `read`.
  """
  with _opened(workdir) as (_, store):
    return store.dictionary()


def with_vocabulary(config: ConfigDict) -> ConfigDict:
  """The config with a `model.vocab_size` that is not 0."""
  whole = config.copy_and_resolve_references()  # a ConfigDict of it shares
  if not whole.model.vocab_size:
    with whole.unlocked():
      whole.model.vocab_size = tokenizers.build(config.data).vocab_size
  return whole.lock()


def initial(config: ConfigDict) -> dict[str, Any]:
  """Parameters as training would draw them from `config.seed`."""
  return jax.tree.map(np.asarray, _setup(config).init()['params'])


@contextlib.contextmanager
def _opened(workdir: Path) -> Iterator[tuple[ConfigDict, Checkpointer]]:
  """The config and the checkpoints of a run."""
  config = config_of(workdir)
  with Checkpointer.open(str(workdir), config, read_only=True) as store:
    yield config, store


def config_of(workdir: Path) -> ConfigDict:
  """The config of a run.

  Raises:
    UserError: there is none; a released checkpoint is told apart.
  """
  path = workdir / 'config.json'
  if not is_file(path):
    raise UserError(f'{workdir} is not the workdir of a run: it has no {path}')
  if 'model_type' in read_json(path):
    raise UserError(
      f'{path} is of a released checkpoint (it has model_type), not of the'
      ' workdir of a run; export and verify take the workdir first and the'
      ' checkpoint second, import the other way round'
    )
  return loading.load(str(path))


def _setup(config: ConfigDict) -> state_lib.Setup:
  """Of training on one device, where arrays are whole."""
  one = mesh_lib.make_mesh(
    dict.fromkeys(mesh_lib.MESH_AXES, 1), jax.devices()[:1]
  )
  return state_lib.setup(config, config.model.vocab_size, one)
