"""The training step and the evaluation step, each one `jax.jit`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from moe_jax.model.attention import AttentionState
from moe_jax.model.decoder import Decoder, Hidden
from moe_jax.model.loss import Targets, cross_entropy
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.routing.balance import Load
from moe_jax.routing.gates import GATES
from moe_jax.training import optimizer
from moe_jax.training.losses import Metrics, auxiliary_loss
from moe_jax.training.state import Setup, TrainState

# {'token_ids': int32 [B, L], 'targets': int32 [B, L], 'padding_mask': bool
# [B, L], True at tokens}, and of a contiguous stream 'segment_start': bool [B],
# True where a row begins anew.
Batch = dict[str, jax.Array]


class _Reads(NamedTuple):
  """What a pass of the model reads beside its parameters.

  Attributes:
    batch: The global batch or a micro-batch.
    attention_state: What attention remembers of its rows.
    step: The training step.
    rng: The key of its random numbers, None where it draws none.
  """

  batch: Batch
  attention_state: AttentionState
  step: jax.Array | None
  rng: jax.Array | None


def make_train_step(
  setup: Setup,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The jitted update; it donates the state it is given.

  The loss is the mean over all targets of the global batch, whatever the mesh
  and the number of micro-batches. What the balance loss is taken over,
  `loss.balance_scope` says: each micro-batch or each sequence, and averaged; or
  the global batch, for which a first pass over its micro-batches counts. Rows
  keep their own memory, whatever micro-batch they are in.
  """
  config = setup.config
  learning_rate = optimizer.schedule(config)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    memory = _restart(state.get('memory', ()), batch)
    rng = _step_rng(state, config)
    reads = _Reads(batch, memory, state['step'], rng)
    grads, metrics, memory = _gradient(setup, state['params'], reads)
    updates, opt_state = setup.tx.update(
      grads, state['opt_state'], state['params']
    )
    params = optax.apply_updates(state['params'], updates)
    metrics['gradient_norm'] = optimizer.trained_norm(
      grads, setup.declarations, config.optimizer.freeze
    )
    metrics['learning_rate'] = learning_rate(state['step'])
    new = {'step': state['step'] + 1, 'params': params, 'opt_state': opt_state}
    if 'memory' in state:
      new['memory'] = memory
    return state | new, metrics

  shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
  return jax.jit(
    train_step,
    in_shardings=(shardings, mesh_lib.batch_sharding(setup.mesh)),
    out_shardings=(shardings, mesh_lib.replicated(setup.mesh)),
    donate_argnums=0,
    compiler_options=mesh_lib.compiler_options(setup.mesh),
  )


def make_eval_step(setup: Setup) -> Callable[..., Metrics]:
  """The jitted evaluation of a batch: sums, so that batches can be added up.

  Returns:
    A function of (params, batch) and, where the batch goes on with the rows of
    the one before, what attention remembers of that one, which it donates. It
    returns {'nll': nats, 'targets': their number, 'load': Load or None,
    'attention_state': for the next batch}.
  """

  def eval_step(
    params: Any, batch: Batch, attention_state: AttentionState
  ) -> Metrics:
    model: Decoder = nnx.merge(setup.eval_graphdef, params)
    x_BLD, load, attention_state = model.hidden(
      batch['token_ids'],
      batch['padding_mask'],
      attention_state=attention_state,
    )
    targets = Targets(
      batch['targets'], batch['padding_mask'].astype(jnp.float32)
    )
    return {
      'nll': cross_entropy(setup.mesh, x_BLD, model.head(), targets),
      'targets': batch['padding_mask'].sum(),
      'load': load,
      'attention_state': attention_state,
    }

  shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract['params'])
  of_state = mesh_lib.memory_sharding(setup.mesh)
  sums = dict.fromkeys(
    ('nll', 'targets', 'load'), mesh_lib.replicated(setup.mesh)
  )
  jitted = jax.jit(
    eval_step,
    in_shardings=(shardings, mesh_lib.batch_sharding(setup.mesh), of_state),
    out_shardings=sums | {'attention_state': of_state},
    donate_argnums=2,
    compiler_options=mesh_lib.compiler_options(setup.mesh),
  )

  def evaluate(
    params: Any, batch: Batch, attention_state: AttentionState = None
  ) -> Metrics:
    if attention_state is None:
      attention_state = setup.start(len(batch['token_ids']))
    return jitted(params, batch, attention_state)

  return evaluate


def _restart(state: AttentionState, batch: Batch) -> AttentionState:
  """Forgets what came before the rows that begin a segment anew."""
  return jax.tree.map(
    lambda a: jnp.where(batch['segment_start'][:, None, None], 0, a), state
  )


def _gradient(
  setup: Setup, params: Any, reads: _Reads
) -> tuple[Any, Metrics, AttentionState]:
  """The gradient over a global batch, its metrics, and the next memory."""
  config, mesh = setup.config, setup.mesh
  count = config.train.accumulation
  num_targets = reads.batch['padding_mask'].sum().astype(jnp.float32)
  of_loss = jax.grad(_loss, argnums=1, has_aux=True)
  if count == 1:
    grads, (metrics, memory) = of_loss(setup, params, reads, num_targets, None)
    return grads, metrics, memory

  parts = _Reads(
    _split(reads.batch, count, mesh),
    _split(reads.attention_state, count, mesh, axis=1),
    None,  # the same for all
    None if reads.rng is None else jax.random.split(reads.rng, count),
  )
  whole = None
  if config.loss.balance_scope == 'global_batch':

    def load_of(part: _Reads) -> tuple[Load | None, None]:
      part = part._replace(step=reads.step)
      return _run(nnx.merge(setup.graphdef, params), part).aux, None

    whole, _ = _sum(load_of, parts)

  def of_part(part: _Reads) -> tuple[Any, AttentionState]:
    part = part._replace(step=reads.step)
    grads, (metrics, memory) = of_loss(setup, params, part, num_targets, whole)
    return (grads, metrics), memory

  (grads, metrics), memory = _sum(of_part, parts)
  return grads, metrics, _join(memory, mesh, axis=1)


def _loss(
  setup: Setup,
  params: Any,
  reads: _Reads,
  num_targets: jax.Array,
  whole: Load | None,
) -> tuple[jax.Array, tuple[Metrics, AttentionState]]:
  """A micro-batch's part of the loss, its metrics, and the next memory.

  Args:
    setup: of the run.
    params: of the model.
    reads: of the micro-batch.
    num_targets: in the global batch.
    whole: as in `auxiliary_loss`.
  """
  config, batch = setup.config, reads.batch
  model: Decoder = nnx.merge(setup.graphdef, params)
  x_BLD, load, memory = _run(model, reads)
  targets = Targets(batch['targets'], batch['padding_mask'] / num_targets)
  loss = cross_entropy(setup.mesh, x_BLD, model.head(), targets)
  share = 1 / config.train.accumulation
  auxiliary, metrics = auxiliary_loss(load, config, share, whole)
  metrics |= {'loss': loss, 'load': load}
  return loss + auxiliary, (metrics, memory)


def _run(model: Decoder, reads: _Reads) -> Hidden:
  batch, attention_state, step, rng = reads
  return model.hidden(
    batch['token_ids'],
    batch['padding_mask'],
    attention_state=attention_state,
    step=step,
    rng=rng,
  )


def _step_rng(state: TrainState, config: ConfigDict) -> jax.Array | None:
  """Returns the key of a step's random numbers; None where it draws none."""
  gate_draws = GATES[config.router.score].draws
  if not (config.model.dropout or config.router.jitter or gate_draws):
    return None
  key = jax.random.wrap_key_data(state['key'])
  return jax.random.fold_in(key, state['step'])


def _sum(function: Callable[[Any], tuple[Any, Any]], parts: Any) -> Any:
  """Calls `function` for one part after the other, the leading axis of `parts`.

  Returns:
    The sum of its first results, and its second results stacked.
  """

  def add(total: Any, part: Any) -> tuple[Any, Any]:
    more, kept = function(part)
    return jax.tree.map(jnp.add, total, more), kept

  first = jax.tree.map(lambda a: a[0], parts)
  shapes, _ = jax.eval_shape(function, first)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  return jax.lax.scan(add, zeros, parts)


def _split(
  tree: Any, count: int, mesh: jax.sharding.Mesh, axis: int = 0
) -> Any:
  """B at `axis` -> [count, ..., B / count, ...], devices keeping their rows."""

  def split(array: jax.Array) -> jax.Array:
    shape = array.shape
    parts = array.reshape(*shape[:axis], -1, count, *shape[axis + 1 :])
    parts = jnp.moveaxis(parts, axis + 1, 0)
    return mesh_lib.shard_tokens(parts, mesh, axis=axis + 1)

  return jax.tree.map(split, tree)


def _join(tree: Any, mesh: jax.sharding.Mesh, axis: int = 0) -> Any:
  """What `_split` took apart."""

  def join(parts: jax.Array) -> jax.Array:
    array = jnp.moveaxis(parts, 0, axis + 1)
    shape = array.shape
    array = array.reshape(*shape[:axis], -1, *shape[axis + 2 :])
    return mesh_lib.shard_tokens(array, mesh, axis=axis)

  return jax.tree.map(join, tree)
