"""The training step and the evaluation step, each one `jax.jit`."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from ml_collections import ConfigDict

from moe_jax.config import mixture
from moe_jax.model.attention import AttentionState, segments_of
from moe_jax.model.decoder import Decoder, Hidden
from moe_jax.model.loss import Loss, Targets, cross_entropy
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.routing.balance import Load
from moe_jax.routing.gates import GATES
from moe_jax.training import micro_batches, offload, optimizer
from moe_jax.training.losses import WHOLE, Metrics, Share, total_loss
from moe_jax.training.state import Setup, TrainState

# {'token_ids': int32 [B, L], 'targets': int32 [B, L], 'padding_mask': bool
# [B, L], True at tokens}, and of a contiguous stream 'segment_start': bool [B],
# True where a row begins anew. Packed rows have 'segment_ids' and 'positions',
# int32 [B, L]: see `Segments`. Where only some tokens are to be predicted there
# is 'target_mask', bool [B, L], True at a subset of the tokens. Of a mixture
# 'source', int32 [B], has the number of the source of each row.
Batch = dict[str, jax.Array]


class Inputs(NamedTuple):
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


class GradientOf(Protocol):
  """What is differentiated of a micro-batch."""

  def __call__(
    self,
    setup: Setup,
    params: Any,
    inputs: Inputs,
    num_targets: jax.Array,
    share: Share,
  ) -> tuple[Any, tuple[Metrics, AttentionState]]:
    """Returns the gradients of what `loss_of` returns, and its rest."""
    ...


class TrainStep(jax.stages.Wrapped, Protocol):
  """The jitted update, which can also be lowered without being run."""

  def __call__(
    self, state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    """Returns the next state, and what is logged of this step."""
    ...


def make_train_step(setup: Setup) -> TrainStep:
  """Returns the jitted update, which donates the state it is given.

  The loss is the mean over all targets of the global batch, which are all its
  tokens unless a `target_mask` names some; routing, its statistics and losses
  are of all tokens. That holds whatever the mesh and the number of
  micro-batches. What the balance loss is taken over, `loss.balance_scope` says:
  each micro-batch or each sequence, and averaged; or the global batch, for
  which a first pass over its micro-batches counts. Rows keep what attention
  remembers of them, whatever micro-batch they are in.
  """
  config = setup.config
  learning_rate = optimizer.schedule(config)
  update = (
    offload.update if config.optimizer.offload else _update_on(setup.mesh)
  )

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    grads, metrics, remembered = gradient(setup, state, batch)
    metrics['gradient_norm'] = optimizer.trained_norm(
      grads, setup.declarations, config.optimizer.freeze
    )
    metrics['learning_rate'] = learning_rate(state['step'])
    finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(
      metrics['gradient_norm']
    )
    with jax.named_scope('optimizer'):
      new = update(setup.tx, finite, grads, state)
    if 'memory' in state:
      new |= _where(finite, {'memory': remembered}, state)
    return state | new | {'step': state['step'] + 1}, metrics

  shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
  return jax.jit(
    train_step,
    in_shardings=(shardings, mesh_lib.batch_sharding(setup.mesh)),
    out_shardings=(shardings, mesh_lib.replicated(setup.mesh)),
    donate_argnums=0,
    compiler_options=mesh_lib.compiler_options(setup.mesh),
  )


def eval_step_of(setup: Setup) -> Callable[..., Metrics]:
  """Returns what `make_eval_step` made of a setup, so that it compiles once."""
  if 'eval_step' not in setup.programs:
    setup.programs['eval_step'] = make_eval_step(setup)
  return setup.programs['eval_step']


def make_eval_step(setup: Setup) -> Callable[..., Metrics]:
  """Returns the jitted evaluation of a batch: sums, which batches add up to.

  Returns:
    A function of (params, batch) and, where the batch goes on with the rows of
    the one before, what attention remembers of that one, which it donates. It
    returns {'nll': nats, 'targets': their number, 'load': Load or None,
    'attention_state': for the next batch}.
  """

  def eval_step(
    params: Any, batch: Batch, attention_state: AttentionState
  ) -> Metrics:
    loss, load, attention_state = _evaluated(
      setup, params, batch, attention_state
    )
    return {
      'nll': loss.sum,
      'targets': _target_mask(batch).sum(),
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


class Scores(NamedTuple):
  """What a model says of the targets of a batch.

  Attributes:
    log_probability_BL: That of each, float32; 0 where nothing is predicted.
    is_best_BL: Whether no token is likelier, bool; True where nothing is.
  """

  log_probability_BL: jax.Array
  is_best_BL: jax.Array


def make_score_step(setup: Setup) -> Callable[[Any, Batch], Scores]:
  """Returns the jitted scoring of a batch, every row a text from its beginning.

  Returns:
    A function of (params, batch), whose result every device has whole.
  """

  def score_step(params: Any, batch: Batch) -> Scores:
    loss, *_ = _evaluated(setup, params, batch, None)
    return Scores(-loss.of_token_BL, loss.is_best_BL | ~_target_mask(batch))

  shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract['params'])
  return jax.jit(
    score_step,
    in_shardings=(shardings, mesh_lib.batch_sharding(setup.mesh)),
    out_shardings=mesh_lib.replicated(setup.mesh),
    compiler_options=mesh_lib.compiler_options(setup.mesh),
  )


def _evaluated(
  setup: Setup, params: Any, batch: Batch, attention_state: AttentionState
) -> tuple[Loss, Load | None, AttentionState]:
  """Returns the loss of a batch's targets, the load and the next state."""
  model: Decoder = nnx.merge(setup.eval_graphdef, params)
  x_BLD, load, attention_state = model.hidden(
    batch['token_ids'],
    batch['padding_mask'],
    attention_state=attention_state,
    segments=segments_of(batch),
  )
  mask_BL = _target_mask(batch)
  targets = Targets(batch['targets'], mask_BL.astype(jnp.float32))
  loss = cross_entropy(setup.mesh, x_BLD, model.head(), targets)
  return loss, load, attention_state


class _Update(Protocol):
  """Makes the next parameters and optimizer state, if there is an update."""

  def __call__(
    self,
    tx: optax.GradientTransformation,
    finite: jax.Array,
    grads: Any,
    state: TrainState,
  ) -> TrainState:
    """Returns both, or where `finite` is False what they were."""
    ...


def _update_on(mesh: jax.sharding.Mesh) -> _Update:
  """Returns the update that suits the devices."""
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  return _update_in_branch if on_cpu else _update


def _update(
  tx: optax.GradientTransformation,
  finite: jax.Array,
  grads: Any,
  state: TrainState,
) -> TrainState:
  return _where(finite, _updated(tx, grads, state), state)


def _update_in_branch(
  tx: optax.GradientTransformation,
  finite: jax.Array,
  grads: Any,
  state: TrainState,
) -> TrainState:
  # XLA on CPU updates a parameter and its moments one after the other. Selects
  # read all that was before, and as the first would overwrite what the others
  # still read, it begins with copies of the moments.
  old = {name: state[name] for name in ('params', 'opt_state')}
  return lax.cond(
    finite,
    lambda old, grads: _updated(tx, grads, old),
    lambda old, _: old,
    old,
    grads,
  )


def _updated(
  tx: optax.GradientTransformation, grads: Any, state: TrainState
) -> TrainState:
  """Returns the next parameters and optimizer state."""
  params = state['params']
  updates, opt_state = tx.update(grads, state['opt_state'], params)
  params = optax.apply_updates(params, updates)
  return {'params': params, 'opt_state': opt_state}


def _where(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
  """Returns `new`, or what it is to replace in `old`.

  Not optax.apply_if_finite: that would add its counters to the optimizer state
  of every checkpoint, knows no loss and no memory, and after a while accepts
  what is not finite. A select reads the state once more; a branch would not,
  but may keep a GPU's host waiting for the condition.
  """
  return {
    name: jax.tree.map(
      lambda after, before: jnp.where(finite, after, before), tree, old[name]
    )
    for name, tree in new.items()
  }


def _restart(state: AttentionState, batch: Batch) -> AttentionState:
  """Forgets what came before the rows that begin a segment anew."""
  return jax.tree.map(
    lambda a: jnp.where(batch['segment_start'][:, None, None], 0, a), state
  )


def inputs_of(setup: Setup, state: TrainState, batch: Batch) -> Inputs:
  """Returns what a step's pass of the model reads."""
  remembered = _restart(state.get('memory', ()), batch)
  rng = _step_rng(state, setup.config)
  return Inputs(batch, remembered, state['step'], rng)


def parts_of(setup: Setup, inputs: Inputs) -> list[Inputs]:
  """Returns what the pass of each micro-batch of a step reads."""
  count = setup.config.train.accumulation
  if count == 1:
    return [inputs]
  parts = split(inputs, count, setup.mesh)
  return [
    jax.tree.map(lambda a, i=i: a[i], parts)._replace(step=inputs.step)
    for i in range(count)
  ]


def gradient(
  setup: Setup,
  state: TrainState,
  batch: Batch,
  gradient_of: GradientOf | None = None,
) -> tuple[Any, Metrics, AttentionState]:
  """Returns a batch's gradient, its metrics and the next attention state.

  Args:
    setup: The run's setup.
    state: The state before the step.
    batch: The global batch.
    gradient_of: What is summed over micro-batches; None for the gradient of the
      loss in the parameters.
  """
  gradient_of = gradient_of or jax.grad(loss_of, argnums=1, has_aux=True)
  params, inputs = state['params'], inputs_of(setup, state, batch)
  whole = _size(inputs.batch)
  count = setup.config.train.accumulation
  if count == 1:
    grads, (metrics, remembered) = gradient_of(
      setup, params, inputs, whole.targets, WHOLE
    )
    return grads, metrics, remembered

  def with_step(part: Inputs) -> Inputs:
    return part._replace(step=inputs.step)

  def load_of(part: Inputs) -> tuple[Load | None, None]:
    return _run(_model(setup, params), with_step(part)).aux, None

  def gradient_of_part(part: Inputs) -> tuple[Any, AttentionState]:
    size = _size(part.batch)
    share = Share(
      size.tokens / whole.tokens, size.sequences / whole.sequences, batch_load
    )
    grads, (metrics, remembered) = gradient_of(
      setup, params, with_step(part), whole.targets, share
    )
    return (grads, metrics), remembered

  parts, batch_load = split(inputs, count, setup.mesh), None
  if setup.config.loss.balance_scope == 'global_batch':
    batch_load, _ = micro_batches.total(load_of, parts)
  (grads, metrics), remembered = micro_batches.total(gradient_of_part, parts)
  return grads, metrics, micro_batches.join(remembered, setup.mesh, axis=1)


def loss_of(
  setup: Setup,
  params: Any,
  inputs: Inputs,
  num_targets: jax.Array,
  share: Share,
) -> tuple[jax.Array, tuple[Metrics, AttentionState]]:
  """Returns a micro-batch's part of the loss, metrics and attention state.

  Args:
    setup: The run's setup.
    params: The model's parameters.
    inputs: The micro-batch.
    num_targets: The number of targets in the global batch.
    share: As in `total_loss`.
  """
  model, batch = _model(setup, params), inputs.batch
  x_BLD, load, remembered = _run(model, inputs)
  targets = Targets(batch['targets'], _target_mask(batch) / num_targets)
  source_BS = None
  if 'source' in batch:
    num_sources = len(mixture.names(setup.config.data))
    source_BS = jax.nn.one_hot(batch['source'], num_sources)
  loss, metrics = total_loss(
    setup.config,
    setup.mesh,
    x_BLD,
    model.head(),
    targets,
    load,
    share,
    source_BS,
  )
  return loss, (metrics, remembered)


class _Size(NamedTuple):
  """How large a batch is, float32.

  Attributes:
    targets: The tokens to be predicted; 1 where there are none, so that their
      mean is 0.
    tokens: The real tokens, which are routed.
    sequences: The sequences with a real token.
  """

  targets: jax.Array
  tokens: jax.Array
  sequences: jax.Array


def _size(batch: Batch) -> _Size:
  mask_BL = batch['padding_mask']
  tokens = mask_BL.sum().astype(jnp.float32)
  targets = tokens
  if 'target_mask' in batch:
    targets = jnp.maximum(batch['target_mask'].sum().astype(jnp.float32), 1)
  return _Size(targets, tokens, mask_BL.any(-1).sum().astype(jnp.float32))


def _target_mask(batch: Batch) -> jax.Array:
  """Returns which tokens are to be predicted; all where nothing is said."""
  return batch.get('target_mask', batch['padding_mask'])


def _model(setup: Setup, params: Any) -> Decoder:
  return nnx.merge(setup.graphdef, params)


def _run(model: Decoder, inputs: Inputs) -> Hidden:
  return model.hidden(
    inputs.batch['token_ids'],
    inputs.batch['padding_mask'],
    attention_state=inputs.attention_state,
    segments=segments_of(inputs.batch),
    step=inputs.step,
    rng=inputs.rng,
  )


def split(inputs: Inputs, count: int, mesh: jax.sharding.Mesh) -> Inputs:
  """Cuts the rows into micro-batches; the step is the same for all."""
  batch, attention_state, _, rng = inputs
  return Inputs(
    micro_batches.split(batch, count, mesh),
    micro_batches.split(attention_state, count, mesh, axis=1),
    None,
    None if rng is None else jax.random.split(rng, count),
  )


def _step_rng(state: TrainState, config: ConfigDict) -> jax.Array | None:
  """Returns the key of a step's random numbers; None where it draws none."""
  gate_draws = GATES[config.router.score].draws
  if not (config.model.dropout or config.router.jitter or gate_draws):
    return None
  key = jax.random.wrap_key_data(state['key'])
  return jax.random.fold_in(key, state['step'])
