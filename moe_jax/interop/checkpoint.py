"""Models on disk: the workdirs that training makes, and released checkpoints.

`read` takes either. Workdirs are written too: `write_run` begins one whose
checkpoint of step 0 holds given parameters.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.config import loading
from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError
from moe_jax.files import expand, tokenizer_file
from moe_jax.interop import formats, released
from moe_jax.interop.formats.base import is_file, read_json
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parameter import VOCAB, Declaration
from moe_jax.training import run_tokenizer
from moe_jax.training import state as state_lib
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.run_dir import RunDir


class Checkpoint(NamedTuple):
  """A model that was read.

  Attributes:
    config: The config of the run, whose `model.vocab_size` is never 0 and whose
      vocabulary has no padding; of a released checkpoint the sections `model`,
      `moe`, `router` and `loss`.
    params: The nested dict of parameters, NumPy arrays.
    step: The training step of the checkpoint; None for a released one.
    tokenizer: That of the run, if it is a file; None otherwise.
  """

  config: ConfigDict
  params: dict[str, Any]
  step: int | None
  tokenizer: Tokenizer | None = None

  @property
  def model(self) -> tuple[ConfigDict, dict[str, Any]]:
    """What computes logits: the config and the parameters."""
    return self.config, self.params


def read(directory: str | Path, step: int | None = None) -> Checkpoint:
  """Reads the workdir of a run, or a released checkpoint of any format.

  Args:
    directory: The workdir, or the folder with `config.json` and safetensors.
    step: The step of the run's checkpoint; None for the newest.

  Raises:
    UserError: The folder holds neither, or no checkpoint of that step; or it
      is damaged, or of a kind that is not supported.
  """
  directory = Path(expand(str(directory)))
  if is_run(directory):
    return read_run(directory, step)
  config, params = released.load(directory, formats.FORMATS)
  if step is not None:
    raise UserError(
      f'{directory} is a released checkpoint, which has no step {step}; only'
      ' the workdir of a run has steps'
    )
  return Checkpoint(config, params, None)


def is_run(directory: Path) -> bool:
  """Returns whether a folder is the workdir of a run."""
  path = directory / 'config.json'
  return is_file(path) and 'router' in read_json(path)


def read_run(workdir: Path, step: int | None = None) -> Checkpoint:
  """Reads a checkpoint of a run.

  Args:
    workdir: The directory of the run.
    step: The step of the checkpoint; None for the newest.

  Raises:
    UserError: There is no such run or checkpoint, or it is damaged.
  """
  config = run_config(workdir)
  tokenizer = _of_file(config, workdir)
  with _opened(workdir, config, tokenizer) as checkpointer:
    config = with_vocab_size(config, tokenizer)
    setup = _setup(config)
    step = checkpointer.latest() if step is None else step
    wanted = {'params': setup.abstract['params']}
    state = checkpointer.restore(wanted, step).state
  params = _of_size(state['params'], setup, config.model.vocab_size)
  with config.unlocked():
    config.model.vocab_multiple = 1
  return Checkpoint(config, params, step, tokenizer)


def _of_file(config: ConfigDict, workdir: Path) -> Tokenizer | None:
  """Returns the tokenizer of a run, if it is a file."""
  if not tokenizer_file(config.data.tokenizer):
    return None
  return run_tokenizer.build(config, str(workdir))


def _of_size(params: Any, setup: state_lib.Setup, rows: int) -> dict[str, Any]:
  """Returns parameters as NumPy arrays, their vocabularies of so many rows."""

  def fit(leaf: Any, declared: Declaration) -> np.ndarray:
    array = np.asarray(leaf)
    if VOCAB not in declared.axes:
      return array
    axis = array.ndim - len(declared.axes) + declared.axes.index(VOCAB)
    kept = array.take(range(min(rows, array.shape[axis])), axis)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, rows - kept.shape[axis])
    return np.pad(kept, widths)

  return jax.tree.map(fit, dict(params), setup.declarations)


def run_config(workdir: Path) -> ConfigDict:
  """Returns the config of a run.

  Raises:
    UserError: There is none; a released checkpoint is told apart.
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


def vocabulary(workdir: Path) -> str | None:
  """Returns the fingerprint of the vocabulary of a run, None if it says none.

  Raises:
    UserError: As `read_run`.
  """
  with _opened(workdir, run_config(workdir)) as checkpointer:
    return checkpointer.vocabulary()


@contextlib.contextmanager
def _opened(
  workdir: Path, config: ConfigDict, tokenizer: Tokenizer | None = None
) -> Iterator[Checkpointer]:
  """Opens the checkpoints of a run, which have to be of that tokenizer."""
  run = RunDir.existing(str(workdir), config)
  vocabulary = tokenizer.fingerprint if tokenizer else None
  with Checkpointer(run, vocabulary) as checkpointer:
    yield checkpointer


def write_run(
  workdir: Path,
  config: ConfigDict,
  params: Mapping[str, Any],
  vocabulary: str | None = None,
) -> None:
  """Makes a workdir whose checkpoint of step 0 holds `params`.

  Training goes on from there, with an optimizer that has seen nothing.

  Args:
    workdir: The directory, which is made here.
    config: The config of the run.
    params: The nested dict of the model's parameters, without padding of the
      vocabulary.
    vocabulary: The fingerprint of the vocabulary whose ids the parameters
      know; None if unknown, or that of a tokenizer that is a file.
  """
  tokenizer = _of_file(config, workdir)
  whole = with_vocab_size(config, tokenizer)
  setup = _setup(whole)
  rows = config_lib.vocab_rows(whole, whole.model.vocab_size)
  placed = jax.tree.map(
    lambda array, leaf: jax.device_put(array, leaf.sharding),
    _of_size(params, setup, rows),
    setup.abstract['params'],
  )
  kept = tokenizers.files_of(tokenizer) if tokenizer else {}
  if tokenizer:
    if vocabulary not in (None, tokenizer.fingerprint):
      raise UserError(
        f'data.tokenizer = {config.data.tokenizer!r} is {tokenizer.name}, and'
        f' the model knows the ids of {str(vocabulary)[:12]}: give its own'
      )
    vocabulary = tokenizer.fingerprint
  state = setup.init(placed)
  run = RunDir.new_or_resumed(str(workdir), config)
  with run.held(), Checkpointer(run, vocabulary) as checkpointer:
    run.claim(kept=kept)
    checkpointer.save(0, state, wait=True)


def initial_params(config: ConfigDict) -> dict[str, Any]:
  """Returns parameters as training would draw them from `config.seed`."""
  return jax.tree.map(np.asarray, _setup(config).init()['params'])


def with_vocab_size(
  config: ConfigDict, tokenizer: Tokenizer | None = None
) -> ConfigDict:
  """Returns the config with a `model.vocab_size` that is not 0.

  Args:
    config: The config.
    tokenizer: Its tokenizer; None makes it, if it has to be asked.
  """
  whole = config.copy_and_resolve_references()  # a ConfigDict of it shares
  if not whole.model.vocab_size:
    with whole.unlocked():
      tokenizer = tokenizer or tokenizers.build(config.data)
      whole.model.vocab_size = tokenizer.vocab_size
  return whole.lock()


def full_config(
  sections: ConfigDict, tokenizer: str, seq_len: Any
) -> ConfigDict:
  """Returns every key of the schema: the model's from `sections`, defaults.

  Args:
    sections: The sections that `released.load` returns.
    tokenizer: The value of `data.tokenizer`.
    seq_len: The value of `data.seq_len`, unless it is no number of tokens.

  Raises:
    UserError: There is no such tokenizer, or the config is not valid.
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


def check_tokenizer(name: str) -> None:
  """Refuses a `data.tokenizer` that there is not.

  Raises:
    UserError: The message lists the tokenizers.
  """
  tokenizers.check_name('--tokenizer', name)


def other_ids(config: ConfigDict) -> str:
  """Tells that ids of `data.tokenizer` are not the model's, if they cannot be.

  It reads no data, so it believes a tokenizer that numbers the tokens of its
  data.
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


def _setup(config: ConfigDict) -> state_lib.Setup:
  """Returns the setup of training on one device, where arrays are whole."""
  one = mesh_lib.make_mesh(
    dict.fromkeys(config_lib.MESH_AXES, 1), jax.devices()[:1]
  )
  return state_lib.setup(config, config.model.vocab_size, one)
