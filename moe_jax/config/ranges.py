"""Which values each key may take on its own.

How keys go together is `checks`' business.
"""

import math

from ml_collections import ConfigDict

from moe_jax.config.derived import get
from moe_jax.errors import UserError, choose

CHOICES = {
  'model.dtype': ('auto', 'float32', 'bfloat16'),
  'model.remat': ('none', 'dots', 'full'),
  'model.norm': ('rms', 'layer'),
  'model.norm_place': ('pre', 'post'),
  'model.positions': ('rotary', 'span'),
  'model.attention': ('auto', 'xla', 'blocks', 'cudnn', 'splash'),
  'model.activation': ('swiglu', 'relu'),
  'moe.dispatch': ('dropless', 'capacity'),
  'moe.priority': ('position', 'probability'),
  'moe.grouped_matmul': (
    'auto',
    'blocks',
    'ragged_dot',
    'padded',
    'triton',
    'mosaic',
  ),
  'moe.exchange': ('auto', 'gather', 'all_to_all', 'ragged'),
  'moe.shared.mixing': ('sum', 'fixed', 'coefficient'),
  'router.score': (
    'linear',
    'mlp',
    'cosine',
    'xmoe',
    'hyper',
    'random',
    'hash',
  ),
  'router.recurrent': ('none', 'gru', 'rnn', 'lstm'),
  'router.projector': ('layerwise', 'shared'),
  'router.passing': ('state', 'detached', 'none'),
  'router.selection': ('top_k', 'top_p'),
  'router.weights': ('softmax', 'chosen', 'sigmoid'),
  'loss.balance_layers': ('separate', 'joined'),
  'loss.balance_scope': ('micro_batch', 'sequence', 'global_batch'),
  'optimizer.freeze': ('none', 'router', 'router_and_cell'),
  'data.order': ('shuffled', 'contiguous'),
}


def _keys(**sections: str) -> list[str]:
  """a='b c' -> ['a.b', 'a.c']."""
  return [
    f'{section}.{name}'
    for section, names in sections.items()
    for name in names.split()
  ]


_AT_LEAST_ONE = _keys(
  model='num_layers hidden_size num_heads num_kv_heads ffn_width unroll',
  moe='top_k expert_width factors every shared.parts',
  router='state_size mlp_width reduced_size groups top_groups',
  train='steps batch_size accumulation',
  data='seq_len threads',
  checkpoint='keep',
)
_AT_LEAST_ZERO = _keys(
  model='head_dim vocab_size span idle_parameters',
  moe='num_experts offset first_dense shared.width'
  ' shared.routed_weight shared.shared_weight',
  router='residual',
  loss='balance_weight z_weight bias_rate',
  optimizer='warmup_steps decay_steps weight_decay clip_norm',
  train='log_every check_replicas_every',
  checkpoint='every keep_every',
  eval='every batches batch_size disable_top',
)
_ABOVE_ZERO = _keys(
  model='rope_theta norm_epsilon init_std',
  moe='capacity_factor buffer_factor',
  optimizer='learning_rate epsilon',
)
_BELOW_ONE = _keys(optimizer='b1 b2', model='dropout', router='jitter top_p')
_SHARES = _keys(optimizer='final_fraction')
_SEEDS = ['seed']  # the data pipeline's generator takes 32 bits
_NOT_EMPTY = _keys(data='name text_key train_split tokenizer', eval='split')


def check(config: ConfigDict) -> None:
  """Refuses the first value out of its range; NaN is outside every range.

  Raises:
    UserError: names the key, its value and the range.
  """
  for keys, inside, wanted in (
    (_AT_LEAST_ONE, lambda value: value >= 1, 'at least 1'),
    (_AT_LEAST_ZERO, lambda value: 0 <= value < math.inf, 'at least 0'),
    (_ABOVE_ZERO, lambda value: 0 < value < math.inf, 'above 0'),
    (_SHARES, lambda value: 0 <= value <= 1, 'between 0 and 1'),
    (_SEEDS, lambda value: 0 <= value < 2**32, 'at least 0 and below 2**32'),
    (_BELOW_ONE, lambda value: 0 <= value < 1, 'at least 0 and below 1'),
    (_NOT_EMPTY, bool, 'a name, not empty'),
  ):
    for key in keys:
      value = get(config, key)
      if not inside(value):
        raise UserError(f'{key} = {value!r} must be {wanted}')
  for key, known in CHOICES.items():
    choose(key, get(config, key), known)
