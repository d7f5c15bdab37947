"""What ran: told before the first step of a run, and kept in run.json."""

import datetime
import importlib.metadata
import os
import platform
import secrets
import sys
from typing import Any

import jax
from ml_collections import ConfigDict

from moe_jax import files
from moe_jax.config import loading, saved
from moe_jax.config.mixture import sources
from moe_jax.data.mixtures import Mixture
from moe_jax.data.sequences import TokenSequences
from moe_jax.model import sizes
from moe_jax.parallel import multihost
from moe_jax.training.state import Setup

# What the numbers of a run may depend on.
_PACKAGES = (
  'jax jaxlib libtpu flax optax orbax-checkpoint numpy tokamax'.split()
)


def versions() -> dict[str, str]:
  """Returns the versions of Python, of this library and of what it uses."""
  found = {'python': platform.python_version()}
  for name in ('moe_jax', *_PACKAGES):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def record(setup: Setup, workdir: str, start: int) -> dict[str, Any]:
  """Returns what is kept in run.json, as JSON can hold it.

  It has `id`, which trackers know the run by, `extensions`, the files of users
  that registered what the run is made of, and `starts`, an entry for each time
  that the run was begun or gone on with: the `step` it started from, what
  `auto` became (`resolved`), `devices`, `mesh`, `processes`, `parameters`, of
  them `active_parameters` of a token, `flops_per_token` of training,
  `versions`, `command` and the time in UTC.

  Args:
    setup: The setup of the run.
    workdir: The directory of the run, whose earlier starts stay.
    start: The step that it starts from.
  """
  device = next(iter(setup.mesh.devices.flat))
  params, declarations = setup.abstract['params'], setup.declarations
  counts = sizes.count_parameters(setup.config, params, declarations)
  flops = sizes.flops_per_token(setup.config, params, declarations)
  now = {
    'step': start,
    'resolved': setup.resolved,
    'devices': f'{setup.mesh.size} {device.device_kind}',
    'mesh': dict(setup.mesh.shape),
    'processes': jax.process_count(),
    'parameters': counts.total,
    'active_parameters': counts.active,
    'flops_per_token': flops,
    'versions': versions(),
    'command': sys.argv,
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }
  return {
    'id': (run_id(workdir) if start else '') or secrets.token_hex(4),
    'extensions': loading.extensions(),
    'starts': [*_earlier(workdir).get('starts', []), now],
  }


def run_id(workdir: str) -> str:
  """Returns the id of the run there; '' if it has none yet."""
  return _earlier(workdir).get('id', '')


def describe(setup: Setup, mixture: Mixture) -> str:
  """Returns model, devices, what `auto` became and data, a line each."""
  config, mesh = setup.config, setup.mesh
  counts = sizes.count_parameters(
    config, setup.abstract['params'], setup.declarations
  )
  device = next(iter(mesh.devices.flat))
  axes = ' x '.join(f'{name} {size}' for name, size in mesh.shape.items())
  processes = (
    ''
    if multihost.is_single_process()
    else f', {jax.process_count()} processes'
  )
  runs = ', '.join(
    f'{part.replace("_", " ")} {name}' for part, name in setup.resolved.items()
  )
  packages = versions()
  used = ', '.join(f'{name} {packages[name]}' for name in ('jax', 'flax'))
  return (
    f'model    {counts.total:,} parameters,'
    f' {counts.active:,} active per token\n'
    f'devices  {mesh.size} {device.device_kind} ({axes}){processes}\n'
    f'runs     {runs}; {used}\n'
    f'{_data(config, mixture)}{_idle_ids(setup)}'
  )


def _data(config: ConfigDict, mixture: Mixture) -> str:
  """Returns what is trained on, a line for every source."""
  lines, steps = [], config.train.steps
  for source, sequences, share, epochs in zip(
    sources(config.data),
    mixture.sequences,
    mixture.shares,
    mixture.epochs(steps),
    strict=True,
  ):
    data = source.data
    name = data.name
    if source.name:
      part = share / sum(mixture.shares)
      name = f'{source.name}, {part:.2%} of the rows, {name}'
    packed = ''
    if data.order == 'packed':
      packed = f', packed with {sequences.packing.waste:.2%} padding'
    lines.append(
      f'data     {name}: {sequences.num_tokens:,} tokens, {epochs:.2f} epochs'
      f' in {steps} steps{packed}{_targets(data, sequences)}'
    )
  return '\n'.join(lines)


def _idle_ids(setup: Setup) -> str:
  """Returns a line on the ids that no text has; '' where there are none."""
  tokenizer, config = setup.tokenizer, setup.config
  if tokenizer is None or tokenizer.vocab_size == setup.vocab_size:
    return ''
  return (
    f'\nids      {tokenizer.vocab_size:,} of model.vocab_size ='
    f' {setup.vocab_size:,} are of data.tokenizer ='
    f' {config.data.tokenizer!r}; no other is read'
  )


def _targets(data: ConfigDict, sequences: TokenSequences) -> str:
  """Returns a line on what is predicted; '' where that is every token."""
  if not sequences.masked:
    return ''
  share = sequences.num_targets / sequences.num_tokens
  cut = ''
  # What separates examples takes a position too.
  count = int((sequences.lengths >= data.seq_len).sum())
  if count and data.order == 'packed':
    cut = (
      f'; {count:,} of {len(sequences.lengths):,} examples longer than'
      f' data.seq_len = {data.seq_len}, cut into pieces'
    )
  return f'\ntargets  loss on {100 * share:.0f} % of tokens{cut}'


def _earlier(workdir: str) -> dict[str, Any]:
  """Returns what is sound in run.json; nothing where it is not readable."""
  try:
    found = files.read_json(os.path.join(workdir, saved.RECORD_FILE))
  except (OSError, ValueError):
    return {}
  kinds = {'id': str, 'starts': list}
  return {
    key: found[key]
    for key, kind in kinds.items()
    if isinstance(found, dict) and isinstance(found.get(key), kind)
  }
