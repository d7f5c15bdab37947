"""Does a step of a run again, and tells where it stops being finite.

The batch and the state before the step follow from the nearest checkpoint and
the position of the data alone. The same program on the same devices gives the
same bits, so where metrics.jsonl says otherwise, neither the program nor the
data is to blame.
"""

import contextlib
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from moe_jax import files
from moe_jax.config.saved import ROLLBACK, SKIPPED_STEP
from moe_jax.data.mixtures import Mixture
from moe_jax.errors import UserError
from moe_jax.model.attention import segments_of
from moe_jax.model.decoder import Decoder
from moe_jax.training import init_from, terminal
from moe_jax.training import state as state_lib
from moe_jax.training.batches import Batches
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.recovery import forgetting
from moe_jax.training.run_dir import RunDir
from moe_jax.training.state import Setup, TrainState
from moe_jax.training.step import (
  Batch,
  Inputs,
  gradient,
  inputs_of,
  make_train_step,
  parts_of,
)

_MOST_TOLD = 10  # parameters
# What a line of metrics.jsonl says that a step computes, and not the clock.
_COMPUTED = ('loss', 'gradient_norm', 'balance_loss', 'z_loss', 'learning_rate')


class Found(NamedTuple):
  """How sound an array is.

  Attributes:
    name: What it is.
    bad: How many of its numbers are not finite.
    size: How many there are.
    largest: The largest magnitude of the finite ones.
  """

  name: str
  bad: int
  size: int
  largest: float


class Replay(NamedTuple):
  """What a step did, done again.

  Attributes:
    step: The number of the step.
    start: The step of the checkpoint it was rebuilt from; 0 without one.
    position: The batches read up to the step, with its own.
    metrics: The scalars that the step computed, by name.
    logged: What metrics.jsonl says of them; empty where it says nothing.
    before: The state before the step, array by array.
    forward: What the forward pass computes, in order, micro-batch after
      micro-batch.
    gradients: The gradient, parameter by parameter.
  """

  step: int
  start: int
  position: int
  metrics: dict[str, float]
  logged: dict[str, float]
  before: list[Found]
  forward: list[Found]
  gradients: list[Found]

  def differing(self) -> list[str]:
    """Returns what is not logged as it was computed now, bit for bit."""
    return [
      name
      for name, value in self.logged.items()
      if not np.array_equal(value, self.metrics[name], equal_nan=True)
    ]

  def text(self) -> str:
    """Returns the findings, in lines."""
    numbers = ', '.join(f'{k} {v:.9g}' for k, v in self.metrics.items())
    return '\n'.join(
      [
        f'step {self.step}, rebuilt from step {self.start}, data position'
        f' {self.position}: {numbers}',
        self._as_logged(),
        self._first(),
        *self._of_gradients(),
        '',
        _table(self.forward),
      ]
    )

  def _as_logged(self) -> str:
    if not self.logged:
      return 'metrics.jsonl has no line of this step to compare with'
    names = self.differing()
    if not names:
      return 'metrics.jsonl says the same, bit for bit'
    told = ', '.join(f'{name} {self.logged[name]:.9g}' for name in names)
    return (
      f'metrics.jsonl says otherwise ({told}): on the same devices and with the'
      ' same versions (run.json) that is a fault of the hardware'
    )

  def _first(self) -> str:
    """Returns where the first number is that is not finite."""
    for kind, all_found in (
      ('before the step', self.before),
      ('in the forward pass', self.forward),
    ):
      for found in all_found:
        if found.bad:
          return f'first not finite: {found.name}, {kind} ({_share(found)})'
    if not np.isfinite(self.metrics['loss']):
      return 'first not finite: the loss itself; all hidden states are finite'
    if any(found.bad for found in self.gradients):
      return 'first not finite: the backward pass; all of the forward is finite'
    return 'everything is finite: state, forward pass, loss and gradient'

  def _of_gradients(self) -> list[str]:
    bad = [found for found in self.gradients if found.bad]
    lines = [f'  gradient of {each.name}: {_share(each)}' for each in bad]
    left = len(lines) - _MOST_TOLD
    more = [f'  and {left} more'] if left > 0 else []
    return lines[:_MOST_TOLD] + more


def replay(config: ConfigDict, workdir: str, step: int) -> Replay:
  """Does a step again, from the nearest checkpoint before it.

  Nothing is written. All processes of a run call this alike.

  Args:
    config: The config of the run.
    workdir: The directory of the run.
    step: The step, from 1 on.

  Raises:
    UserError: Anything is wrong with config, data, workdir or step.
  """
  if not 1 <= step <= config.train.steps:
    raise UserError(
      f'--step = {step} must be between 1 and train.steps ='
      f' {config.train.steps}'
    )
  setup = state_lib.from_config_together(config, workdir)
  assert setup.tokenizer is not None  # from_config asks for the data's
  mixture = Mixture.open(config.data, setup.tokenizer, config.train.batch_size)
  rows = _rows(workdir)
  start, state, position = _nearest(setup, workdir, step)
  with contextlib.closing(Batches(setup, mixture, position)) as batches:
    train_step = make_train_step(setup)
    for number in range(start + 1, step + 1):
      for row in rows:
        if row['split'] == ROLLBACK and row['step'] == number:
          batches.seek(row['position'])
          state = forgetting(setup, state)
      batch = next(batches)
      if number < step:
        state, _ = train_step(state, batch)
    found = _examined(setup, state, batch)
    _, metrics = train_step(state, batch)
  computed = {
    name: float(metrics[name]) for name in _COMPUTED if name in metrics
  }
  return Replay(
    step, start, batches.position, computed, _logged(rows, step), *found
  )


def _nearest(
  setup: Setup, workdir: str, step: int
) -> tuple[int, TrainState, int]:
  """Returns the last state kept from before a step, and its data position."""
  run = RunDir.existing(workdir, setup.config)
  with Checkpointer(run, setup.vocabulary) as checkpointer:
    before = [each for each in checkpointer.steps() if each < step]
    if not before:
      return 0, setup.init(init_from.params(setup)), 0
    start = before[-1]
    restored = checkpointer.restore(setup.abstract, start)
    return start, restored.state, restored.position


def _examined(
  setup: Setup, state: TrainState, batch: Batch
) -> tuple[list[Found], list[Found], list[Found]]:
  """Looks at the state, at what a step computes of it, and at the gradient."""
  names: list[str] = []

  def forward(state: TrainState, batch: Batch) -> list[dict[str, jax.Array]]:
    names.clear()
    parts = parts_of(setup, inputs_of(setup, state, batch))
    found = []
    for number, part in enumerate(parts, start=1):
      model: Decoder = nnx.merge(setup.graphdef, state['params'])
      for name, array in _activations(model, part):
        of_part = f'micro-batch {number}, ' if len(parts) > 1 else ''
        names.append(of_part + name)
        found.append(_measured(array))
    return found

  def of_gradient(state: TrainState, batch: Batch) -> Any:
    return jax.tree.map(_measured, gradient(setup, state, batch)[0])

  kept = {name: state[name] for name in state if name not in ('step', 'key')}
  before = jax.jit(functools.partial(jax.tree.map, _measured))(kept)
  measured = jax.jit(forward)(state, batch)
  gradients = jax.jit(of_gradient)(state, batch)
  return (
    _by_path(before),
    [_found(*each) for each in zip(names, measured, strict=True)],
    _by_path(gradients),
  )


def _activations(model: Decoder, inputs: Inputs) -> Any:
  """Yields the names and arrays of a forward pass, in its order."""
  batch = inputs.batch
  layers = model.layer_by_layer(
    batch['token_ids'],
    batch['padding_mask'],
    attention_state=inputs.attention_state,
    segments=segments_of(batch),
    step=inputs.step,
    rng=inputs.rng,
  )
  for number, (carry, aux) in enumerate(layers):
    name = f'layer {number}' if number else 'embedding'
    if aux is not None:
      logits = aux.routing.logits_TN
      # A gate may rule an expert out by a logit of minus infinity.
      finite = jnp.where(jnp.isneginf(logits), 0, logits)
      yield f'{name}, router logits', finite
      yield f'{name}, expert weights', aux.routing.weights_TK
    yield f'{name}, output', carry.x_BLD
  if model.norm is not None:
    yield 'last norm', model.norm(carry.x_BLD)


def _measured(array: jax.Array) -> dict[str, jax.Array]:
  """Returns how many numbers are not finite, and the largest that is."""
  finite = jnp.isfinite(array)
  return {
    'bad': (~finite).sum(),
    'size': jnp.array(array.size),
    'largest': jnp.where(finite, jnp.abs(array), 0).max(),
  }


def _found(name: str, measured: dict[str, jax.Array]) -> Found:
  bad, size, largest = (measured[key] for key in ('bad', 'size', 'largest'))
  return Found(name, int(bad), int(size), float(largest))


def _by_path(tree: Any) -> list[Found]:
  """Returns what was measured of every leaf, by its path."""
  leaves = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda node: isinstance(node, dict) and 'bad' in node
  )
  return [
    _found(jax.tree_util.keystr(path, simple=True, separator='.'), leaf)
    for path, leaf in leaves
  ]


def _share(found: Found) -> str:
  return f'{found.bad:,} of {found.size:,} numbers'


def _table(all_found: list[Found]) -> str:
  rows = [
    [each.name, f'{each.bad:,}', f'{each.largest:.4g}'] for each in all_found
  ]
  return terminal.summary_table(
    [['forward pass', 'not finite', 'largest'], *rows]
  )


def _rows(workdir: str) -> list[dict[str, Any]]:
  """Returns the lines of metrics.jsonl that are of steps, without others."""
  rows = []
  with contextlib.suppress(FileNotFoundError):
    path = os.path.join(workdir, 'metrics.jsonl')
    with open(path, encoding='utf-8', errors='replace') as file:
      for line in file:
        with contextlib.suppress(ValueError):
          rows.append(files.parse_json(line))
  return [
    row for row in rows if isinstance(row, dict) and {'step', 'split'} <= {*row}
  ]


def _logged(rows: list[dict[str, Any]], step: int) -> dict[str, float]:
  """Returns what metrics.jsonl says of what a step computed."""
  found: dict[str, float] = {}
  for row in rows:
    if row['step'] == step and row['split'] in ('train', SKIPPED_STEP):
      found |= {name: float(row[name]) for name in _COMPUTED if name in row}
  return found
