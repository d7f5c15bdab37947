"""The state of a training run: a plain dict of arrays, made where it lives."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax import parameter
from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.model import implementations, tuned
from moe_jax.model.attention import AttentionState
from moe_jax.model.decoder import Decoder
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import multihost
from moe_jax.training import offload, optimizer, run_tokenizer

# {'step': int32, 'params': ..., 'opt_state': ..., 'key': uint32[2]}, and where
# attention remembers something 'memory': its state, arrays [layers, B, ...].
# The key is the run's random state; whoever needs randomness in a step folds
# the step into it.
TrainState = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a config makes, before any array exists.

  Attributes:
    graphdef: The definition that, merged with parameters, is the model.
    eval_graphdef: The same for evaluation, where `eval.disable_top` counts.
    declarations: What each parameter is, a tree like that of the parameters.
    tx: The optimizer.
    abstract: The state as `ShapeDtypeStruct`s with shardings.
    mesh: Where the state lives.
    config: The whole config.
    vocab_size: V.
    tokenizer: The data's; None where only shapes were asked for.
    programs: What has been jitted of it, by name, for who needs it again.
  """

  graphdef: nnx.GraphDef
  eval_graphdef: nnx.GraphDef
  declarations: Any
  tx: optax.GradientTransformation
  abstract: TrainState
  mesh: Mesh
  config: ConfigDict
  vocab_size: int
  tokenizer: Tokenizer | None = None
  programs: dict[str, Any] = dataclasses.field(default_factory=dict, init=False)

  @property
  def vocabulary(self) -> str | None:
    """The fingerprint of the data's vocabulary; None if there is only one."""
    return self.tokenizer.fingerprint if self.tokenizer else None

  @property
  def kept_files(self) -> dict[str, bytes]:
    """What the run keeps a copy of, by the copy's name."""
    return tokenizers.files_of(self.tokenizer) if self.tokenizer else {}

  @property
  def resolved(self) -> dict[str, str]:
    """What runs where the config says `auto`; see `implementations`."""
    device = implementations.first_device(self.mesh)
    return implementations.resolved(self.config, self.mesh.shape, device)

  def init(self, params: Any = None) -> TrainState:
    """Makes the state from `config.seed`, every leaf already in its place.

    Args:
      params: The model's parameters, in their places; None draws them. They
        become part of the state as they are: a second set never exists.
    """
    key = jax.random.key(self.config.seed)
    if params is None:
      return self._jit(self._create, self.abstract)(key)
    rest = {k: leaf for k, leaf in self.abstract.items() if k != 'params'}
    return self._jit(self._rest, rest)(key, params) | {'params': params}

  def _jit(
    self, make: Callable[..., TrainState], abstract: TrainState
  ) -> Callable[..., TrainState]:
    return jax.jit(
      make,
      out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
      compiler_options=_init_options(self.mesh),
    )

  def _create(self, key: jax.Array) -> TrainState:
    params_key, _ = jax.random.split(key)
    params = _init_params(self.config, self.vocab_size, self.mesh, params_key)
    return self._rest(key, params) | {'params': params}

  def _rest(self, key: jax.Array, params: Any) -> TrainState:
    """Makes all of the first state but its parameters."""
    _, run_key = jax.random.split(key)
    memory = self._start(params, self.config.train.batch_size)
    state = {
      'step': jnp.zeros((), jnp.int32),
      'opt_state': self.tx.init(params),
      'key': jax.random.key_data(run_key),
    }
    return state | ({'memory': memory} if jax.tree.leaves(memory) else {})

  def start(self, batch_size: int) -> AttentionState:
    """Returns what attention remembers at the beginning of a text."""
    start = functools.partial(self._start, self.abstract['params'], batch_size)
    return jax.jit(start, out_shardings=mesh_lib.memory_sharding(self.mesh))()

  def _start(self, params: Any, batch_size: int) -> AttentionState:
    model: Decoder = nnx.merge(self.graphdef, params)
    return model.start(batch_size)


def from_config(config: ConfigDict, workdir: str = '') -> Setup:
  """Returns the setup of a config on all devices there are.

  Args:
    config: The config.
    workdir: The directory of the run whose tokenizer it is; '' for none.

  Raises:
    UserError: Anything is wrong with the config.
  """
  config_lib.validate(config, jax.device_count())
  mesh = mesh_lib.from_config(config, jax.devices())
  tokenizer = run_tokenizer.build(config, workdir)
  vocab_size = config_lib.vocab_size(config, tokenizer.vocab_size)
  return dataclasses.replace(
    setup(config, vocab_size, mesh), tokenizer=tokenizer
  )


def from_config_together(config: ConfigDict, workdir: str) -> Setup:
  """Returns what `from_config` does, in each process of a run.

  Process 0 is done before the others begin.

  Raises:
    UserError: As `from_config` does, in this process or another.
  """
  share_measurements()
  return multihost.first_process_first(lambda: from_config(config, workdir))


def share_measurements() -> None:
  """Has all processes of a run use what process 0 has measured.

  With other grouped matmuls theirs would be another program. All call it alike.
  """
  if not multihost.is_single_process():
    tuned.share(multihost.broadcast_text)


def setup(config: ConfigDict, vocab_size: int, mesh: Mesh) -> Setup:
  """Returns a setup: shapes, then shardings; `Setup.init` makes the arrays.

  Args:
    config: A validated config.
    vocab_size: V.
    mesh: A mesh with the axes of `moe_jax.parallel.mesh`.

  Raises:
    UserError: A mesh axis does not divide a dimension of a parameter.
  """
  model = abstract_model(config, vocab_size, mesh, disable_top=0)
  evaluated = abstract_model(config, vocab_size, mesh, config.eval.disable_top)
  declarations = parameter.declarations(model)
  without_state = Setup(
    nnx.graphdef(model),
    nnx.graphdef(evaluated),
    declarations,
    optimizer.make(config, declarations),
    {},
    mesh,
    config,
    vocab_size,
  )
  shapes = jax.eval_shape(without_state._create, jax.random.key(0))
  shardings = mesh_lib.shardings(shapes, shapes['params'], declarations, mesh)
  if config.optimizer.offload:
    shardings['opt_state'] = offload.shardings(
      shapes['opt_state'], shapes['params'], shardings['opt_state'], mesh
    )
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    shardings,
  )
  return dataclasses.replace(without_state, abstract=abstract)


def abstract_model(
  config: ConfigDict, vocab_size: int, mesh: Mesh, disable_top: int
) -> Decoder:
  """Returns a model of shapes alone; `disable_top` as in `Decoder`."""

  def make() -> Decoder:
    return Decoder(
      config,
      vocab_size,
      mesh,
      rngs=nnx.Rngs(params=0),
      disable_top=disable_top,
    )

  return nnx.eval_shape(make)


def _init_options(mesh: Mesh) -> dict[str, int] | None:
  """Returns options by which a CPU's random numbers compile in a third.

  They run as fast as with others.
  """
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  return {'xla_backend_optimization_level': 1} if on_cpu else None


def _init_params(
  config: ConfigDict, vocab_size: int, mesh: Mesh, key: jax.Array
) -> dict[str, Any]:
  model = Decoder(config, vocab_size, mesh, rngs=nnx.Rngs(params=key))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))
