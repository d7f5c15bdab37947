"""Refuses configs that cannot run: keys that contradict each other.

Nothing here imports jax, so that a mistake is reported before any device is
touched.
"""

import math

from ml_collections import ConfigDict

from moe_jax.config import conflicts, evaluations, mixture
from moe_jax.config.derived import (
  BATCH_AXES,
  get,
  head_dim,
  layer_kinds,
  mesh_shape,
  written_out,
)
from moe_jax.config.keys import LARGEST
from moe_jax.config.schema import KEYS, REQUIRED
from moe_jax.errors import UserError


def validate(config: ConfigDict, num_devices: int) -> None:
  """Refuses values out of range and keys that contradict each other.

  Args:
    config: Has exactly the keys of the schema.
    num_devices: The devices of all hosts together.

  Raises:
    UserError: The message has the keys, their values and what would be right.
  """
  for name, key in KEYS.items():
    key.check(name, get(config, name))
  _check_experts(config)
  _check_heads(config)
  _check_positions(config)
  _check_optimizer(config)
  _check_data(config)
  _check_profile(config)
  evaluations.asked(config)
  mesh = mesh_shape(config, num_devices)
  _check_split_sizes(config, mesh)
  _check_batches(config, mesh)


_ASKED_FOR = {
  'train.init_from': (
    '--config.train.init_from=WORKDIR, the run whose newest parameters are the'
    " start (or '' to start anew)"
  ),
  'data.path': '--config.data.path=PATH, the examples',
}


def check_given(config: ConfigDict) -> None:
  """Refuses a new run of a preset that leaves paths to its user.

  Raises:
    UserError: One is not given; the message has the options to add.
  """
  missing = [key for key in _ASKED_FOR if get(config, key) == REQUIRED]
  if missing:
    verb = 'is' if len(missing) == 1 else 'are'
    raise UserError(
      f'{" and ".join(missing)} {verb} not given, and this config trains a'
      f' model further: add {" and ".join(_ASKED_FOR[key] for key in missing)}'
    )


def _check_experts(config: ConfigDict) -> None:
  moe = config.moe
  if not moe.num_experts:
    conflicts.check_dense(config)
    return
  if moe.top_k > moe.num_experts:
    raise UserError(
      f'moe.top_k = {moe.top_k} is above moe.num_experts ='
      f' {moe.num_experts}; a token can choose {moe.num_experts} at most'
    )
  _check_divides(config, 'moe.expert_width', moe.factors, 'moe.factors')
  factors, parts = moe.factors, moe.shared.parts
  name = 'moe.factors'
  if parts > 1:
    name = f'moe.factors x moe.shared.parts = {factors} x {parts}'
  _check_divides(config, 'moe.shared.width', factors * parts, name)
  _check_divides(
    config, 'moe.num_experts', config.router.groups, 'router.groups'
  )
  if 'moe' not in layer_kinds(config):
    raise UserError(
      f'moe.first_dense = {moe.first_dense}, moe.offset = {moe.offset} and'
      f' moe.every = {moe.every} leave no MoE layer among model.num_layers ='
      f' {config.model.num_layers}; set moe.num_experts = 0 for a dense model'
    )
  conflicts.check(config, layer_kinds(config).count('moe') * moe.factors)


def _check_heads(config: ConfigDict) -> None:
  model = config.model
  if not model.head_dim:
    _check_divides(
      config, 'model.hidden_size', model.num_heads, 'model.num_heads'
    )
  _check_divides(
    config, 'model.num_heads', model.num_kv_heads, 'model.num_kv_heads'
  )
  if model.positions == 'rotary' and head_dim(config) % 2:
    raise UserError(
      f'the head size {head_dim(config)} (model.head_dim, or'
      f' model.hidden_size / model.num_heads = {model.hidden_size} /'
      f' {model.num_heads}) is odd; rotary positions turn pairs'
    )


def _check_positions(config: ConfigDict) -> None:
  model, order = config.model, config.data.order
  if model.positions == 'span' and not model.span:
    raise UserError(
      "model.span = 0 must be at least 1 when model.positions = 'span': the"
      ' tokens that a token sees'
    )
  if model.positions != 'span' and model.span:
    raise UserError(
      f"model.span = {model.span} is only for model.positions = 'span', and"
      f' model.positions = {model.positions!r}; set one of them'
    )
  if model.positions == 'span' and model.attention != 'auto':
    raise UserError(
      f'model.attention = {model.attention!r} is of rotary positions, and'
      " model.positions = 'span'; 'auto' goes with both"
    )
  if model.dropout and model.attention not in ('auto', 'blocks'):
    raise UserError(
      f'model.attention = {model.attention!r} has no dropout, and model.dropout'
      f" = {model.dropout}; 'auto' and 'blocks' have"
    )
  if model.positions == 'span' and order != 'contiguous':
    raise UserError(
      f"model.positions = 'span' remembers the segment before, and data.order"
      f" = {order!r} reads another one; set data.order = 'contiguous'"
    )


def _check_optimizer(config: ConfigDict) -> None:
  warmup, end = config.optimizer.warmup_steps, config.optimizer.decay_steps
  if end and warmup >= end:
    raise UserError(
      f'optimizer.warmup_steps = {warmup} must be below'
      f' optimizer.decay_steps = {end}, where the decay ends'
    )


def _check_data(config: ConfigDict) -> None:
  for source in mixture.sources(config.data):
    try:
      _check_source(source.data)
    except UserError as error:
      raise mixture.of_source(source.name, error) from error
  if config.data.mixture and config.data.tokenizer in ('enwik8', 'words'):
    raise UserError(
      f'data.tokenizer = {config.data.tokenizer!r} makes its vocabulary of one'
      ' data set, and data.mixture has several: moe_jax tokenizer train makes'
      ' one of them all, of words too, and data.tokenizer takes its path'
    )
  if config.data.temperature != 1 and not config.data.mixture:
    raise UserError(
      f'data.temperature = {config.data.temperature} is of the shares of a'
      " mixture, and data.mixture = ''; set 1.0"
    )


def _check_source(data: ConfigDict) -> None:
  what = {'text_folder': 'a folder', 'files': 'a file, a folder or a pattern'}
  if data.name in what and not data.path:
    raise UserError(
      f"data.path = '' must name {what[data.name]} when data.name ="
      f' {data.name!r}'
    )
  if data.format == 'text':
    return
  if data.name != 'files' and not data.name.startswith('huggingface:'):
    raise UserError(
      f'data.format = {data.format!r} is of rows, and data.name = {data.name!r}'
      " has texts; set data.name = 'files' or 'huggingface:OWNER/NAME', or"
      " data.format = 'text'"
    )
  if data.text_key != KEYS['data.text_key'].default:
    raise UserError(
      f'data.text_key = {data.text_key!r} is not read with data.format ='
      f' {data.format!r}, whose fields have fixed names: leave it out'
    )


def _check_profile(config: ConfigDict) -> None:
  profile = config.train.profile
  start, _, steps = profile.partition(':')
  if profile and not (start.isdecimal() and steps.isdecimal() and int(steps)):
    raise UserError(
      f'train.profile = {profile!r} must be START:STEPS, such as 10:5, or'
      ' empty: the first step that is traced, and how many are'
    )


def _check_split_sizes(config: ConfigDict, mesh: dict[str, int]) -> None:
  """Refuses a mesh that would split sizes unevenly."""
  tensor, kinds = mesh['tensor'], layer_kinds(config)
  _check_divides(config, 'model.hidden_size', mesh['fsdp'], 'mesh.fsdp')
  _check_divides(config, 'model.num_heads', tensor, 'mesh.tensor')
  _check_divides(config, 'model.num_kv_heads', tensor, 'mesh.tensor')
  if 'dense' in kinds:
    _check_divides(config, 'model.ffn_width', tensor, 'mesh.tensor')
  _check_context(config, mesh)
  if 'moe' in kinds:
    _check_exchange(config, mesh)
    factors = config.moe.factors
    for key in ('moe.expert_width', 'moe.shared.width'):
      _check_divides(
        config,
        key,
        factors * tensor,
        f'moe.factors x mesh.tensor = {factors} x {tensor}',
      )


def _check_context(config: ConfigDict, mesh: dict[str, int]) -> None:
  """Refuses to split positions where that cannot be, or unevenly."""
  context, tensor = mesh['context'], mesh['tensor']
  if context == 1:
    return
  if config.model.positions == 'span':
    raise UserError(
      f"mesh.context = {context} splits positions, and model.positions = 'span'"
      ' reaches back to those of the segment before; set mesh.context = 1'
    )
  _check_divides(config, 'data.seq_len', context, 'mesh.context')
  _check_divides(
    config,
    'model.num_heads',  # which attention has split in place of positions
    context * tensor,
    f'mesh.context x mesh.tensor = {context} x {tensor}',
  )


def _check_exchange(config: ConfigDict, mesh: dict[str, int]) -> None:
  """Refuses an expert axis on which devices had unequal numbers of experts."""
  moe, expert = config.moe, mesh['expert']
  if moe.dispatch == 'capacity' and moe.exchange == 'ragged':
    raise UserError(
      "moe.exchange = 'ragged' is only for moe.dispatch = 'dropless'; with"
      " moe.dispatch = 'capacity' moe.exchange may be gather or all_to_all"
    )
  if moe.num_experts % expert == 0:
    return
  wrong = f'mesh.expert = {expert} does not divide moe.num_experts'
  if expert % moe.num_experts == 0:
    rest = expert // moe.num_experts
    raise UserError(
      f'{wrong} = {moe.num_experts}; mesh.expert = {moe.num_experts} would be'
      f' right with mesh.tensor = {mesh["tensor"] * rest}, which splits the'
      f' width of every expert, or with mesh.data = {mesh["data"] * rest}'
    )
  fitting = [
    n for n in range(1, moe.num_experts + 1) if moe.num_experts % n == 0
  ]
  raise UserError(
    f'{wrong} = {moe.num_experts}; {", ".join(map(str, fitting))} would'
  )


def _check_batches(config: ConfigDict, mesh: dict[str, int]) -> None:
  """Refuses batches of which devices had unequal numbers of sequences."""
  names = [f'mesh.{axis}' for axis in BATCH_AXES]
  sizes = [mesh[axis] for axis in BATCH_AXES]
  key = 'eval.batch_size' if config.eval.batch_size else 'train.batch_size'
  _check_divides(config, key, math.prod(sizes), written_out(names, sizes))
  for batch in {key, 'train.batch_size'}:
    _check_tokens(batch, get(config, batch), config.data.seq_len)
  names.append('train.accumulation')
  sizes.append(config.train.accumulation)
  _check_divides(
    config, 'train.batch_size', math.prod(sizes), written_out(names, sizes)
  )


def _check_tokens(key: str, num_sequences: int, seq_len: int) -> None:
  """Refuses a batch whose tokens cannot be counted in int32."""
  if num_sequences * seq_len > LARGEST:
    raise UserError(
      f'{key} x data.seq_len = {num_sequences} x {seq_len} tokens are above'
      f' {LARGEST}, the most that a batch may have; lower one of them'
    )


def _check_divides(
  config: ConfigDict, key: str, divisor: int, name: str
) -> None:
  """Refuses a value of `key` that `divisor`, called `name`, does not divide."""
  value = get(config, key)
  if value % divisor == 0:
    return
  above = value + divisor - value % divisor
  below = value - value % divisor
  fitting = f'{below} or {above}' if below else f'{above}'
  raise UserError(
    f'{key} = {value} is not divisible by {name} = {divisor};'
    f' {fitting} would be'
  )
