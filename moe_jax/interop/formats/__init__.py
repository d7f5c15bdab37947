"""The released formats, told apart by what a folder holds.

Whatever would make a model compute something else than its own code does is
refused; keys that its forward pass does not read are ignored.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe_jax.errors import UserError, choose
from moe_jax.interop import canonical
from moe_jax.interop.formats import cartesian, llama, mixtral, rmoe
from moe_jax.interop.formats.base import Keys, is_file, read_json

# In this order: what CartesianMoE's code wrote calls itself a Llama too.
FORMATS = {
  'rmoe': rmoe.FORMAT,
  'cartesian': cartesian.FORMAT,
  'mixtral': mixtral.FORMAT,
  'llama': llama.FORMAT,
}
ROUTED = ('rmoe', 'cartesian', 'mixtral')
_SUPPORTED = (
  'supported: "llama_moe_rnn", which is RMoE; "llama" with the key'
  ' c2_fine_grain, which is CartesianMoE; "mixtral"'
)
# Ten times what any published model has: their tensors are listed by name
# before a file is read.
_MOST_EXPERTS = 2**18
_PICKLES = ('*.bin', '*.bin.index.json', '*.pt', '*.pth', '*.ckpt')


def read(
  directory: Path, allowed: Iterable[str] = ROUTED
) -> tuple[str, ConfigDict]:
  """Reads the `config.json` of a checkpoint.

  Args:
    directory: The folder of the checkpoint.
    allowed: The names of the formats that will do.

  Returns:
    The name of the format, and a config with the sections of
    `canonical.CANONICAL`: what `moe_jax.model.build` and the balance loss read.

  Raises:
    UserError: The folder holds no checkpoint, or one of another kind, which
      the message names; or a key is missing or has a value that is not
      supported.
  """
  path = directory / 'config.json'
  _refuse_other_folders(directory)
  values = read_json(path)
  _refuse_other_configs(path, values)
  names = [name for name, f in FORMATS.items() if f.recognises(values)]
  if not names:
    kind = json.dumps(values.get('model_type'))
    raise UserError(
      f'{path}: model_type = {kind} is not a released format that can be read'
      f' ({_SUPPORTED})'
    )
  if names[0] not in allowed:
    raise UserError(f'{path} is of {_article(names[0])}, {_why_not(names[0])}')
  return names[0], parse(path, values, names[0])


def parse(path: Path, values: dict[str, Any], name: str) -> ConfigDict:
  """Returns the config that these values of a `config.json` mean.

  Raises:
    UserError: A key is missing or has a value that is not supported.
  """
  keys = Keys(path, FORMATS[name].defaults | values)
  config = canonical.config_of(**FORMATS[name].read(keys))
  model, moe = config.model, config.moe
  experts = model.num_layers * moe.factors * moe.num_experts
  if experts > _MOST_EXPERTS:
    raise UserError(
      f'{path} has {model.num_layers} layers of {moe.factors} x'
      f' {moe.num_experts} experts; no more than {_MOST_EXPERTS} altogether can'
      ' be read, as each is tensors of its own'
    )
  return config


def write(config: ConfigDict, name: str) -> dict[str, Any]:
  """Returns the `config.json` of a model of ours in a format.

  Raises:
    UserError: The format cannot say what the model is; it names the key.
  """
  choose('--format', name, FORMATS)
  values = FORMATS[name].write(config)
  ours = canonical.meaning(config)
  theirs = canonical.meaning(parse(Path('config.json'), values, name))
  for key in ours:
    if ours[key] != theirs[key]:
      raise UserError(
        f"{key} = {ours[key]!r} cannot be said in the format '{name}',"
        f' where it would be {theirs[key]!r}'
      )
  return values


def _refuse_other_folders(directory: Path) -> None:
  """Refuses folders that do not hold a released checkpoint at all."""
  if directory.is_file():
    raise UserError(f'{directory} is a file; give the folder it is in')
  if is_file(directory / 'config.json'):
    return
  if directory.is_dir() and _orbax(directory):
    raise UserError(
      f'{directory} is an Orbax checkpoint, not a released one: there is no'
      f' {directory / "config.json"}; give the workdir it is in to export'
    )


def _orbax(directory: Path) -> bool:
  """Returns whether the folder is, or holds, a checkpoint of a run."""
  names = ('_CHECKPOINT_METADATA', '_METADATA', 'checkpoints', 'manifest.ocdbt')
  try:
    inside = [path / '_CHECKPOINT_METADATA' for path in directory.iterdir()]
  except OSError as error:
    raise UserError(f'{directory} cannot be read: {error.strerror}') from error
  here = any((directory / name).exists() for name in names)
  return here or any(path.exists() for path in inside)


def _refuse_other_configs(path: Path, values: dict[str, Any]) -> None:
  """Refuses a run's config, and weights that only PyTorch can read."""
  if {'model', 'moe', 'router'} <= values.keys():
    raise UserError(
      f'{path} is of a workdir of moe_jax, not of a released checkpoint;'
      ' moe_jax convert export makes one of it'
    )
  folder = path.parent
  pickles = [file.name for kind in _PICKLES for file in folder.glob(kind)]
  if pickles and not list(folder.glob('*.safetensors*')):
    raise UserError(
      f'{folder} holds a PyTorch checkpoint ({sorted(pickles)[0]}), a pickle'
      ' that would have to be run; save it as safetensors first'
    )


def _article(name: str) -> str:
  return {'llama': 'an ordinary Llama', 'mixtral': 'a Mixtral'}.get(
    name, f"the format '{name}'"
  )


def _why_not(name: str) -> str:
  if name == 'llama':
    return (
      'which has no experts; moe_jax convert upcycle makes an MoE of it'
      f' ({_SUPPORTED})'
    )
  return 'which will not do here: a dense model is needed'
