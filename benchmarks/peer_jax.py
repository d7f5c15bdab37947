"""Our side of `benchmarks.peers`: a worker of a duel.

python -m benchmarks.peer_jax SIZES_AS_JSON
"""

import sys

from ml_collections import ConfigDict

from benchmarks.peer_sizes import Sizes
from moe_jax import config as config_lib
from moe_jax import runtime


def main(sizes_json: str) -> None:
  """Trains on random tokens, one step at a time."""
  tuned = runtime.configure_malloc()  # before jax is imported
  runtime.silence_plugins()
  import jax

  from benchmarks import common, duel
  from moe_jax.model.build import compute_dtype
  from moe_jax.model.sizes import count_parameters
  from moe_jax.planning.compiled import train_step as compile_train_step

  made = common.set_up(config_of(Sizes.from_json(sizes_json)))
  compiled, seconds = compile_train_step(made)
  state = made.init()
  [batch] = common.random_batches(made, 1)

  def step() -> None:
    nonlocal state
    state, _ = jax.block_until_ready(compiled(state, batch))

  step()
  peak, source = common.peak_memory(compiled)
  facts = {
    'parameters': count_parameters(
      made.config, state['params'], made.declarations
    ).total,
    'dtype': str(compute_dtype(made.config, made.mesh)),
    'compile_seconds': seconds,
    'program_peak_bytes': peak,
    'program_peak_source': source,
    'tuned_allocator': tuned,
  } | common.place()
  duel.serve(step, facts)


def config_of(sizes: Sizes) -> ConfigDict:
  """The same model and training in our words."""
  config = config_lib.get_config()
  values = {
    'model': ('hidden_size num_layers num_heads num_kv_heads vocab_size'),
    'moe': 'expert_width num_experts top_k',
    'train': 'batch_size',
    'data': 'seq_len',
    'loss': 'balance_weight',
    'optimizer': 'clip_norm learning_rate weight_decay',
  }
  for section, names in values.items():
    for name in names.split():
      config[section][name] = getattr(sizes, name)
  config.loss.balance_layers = 'joined'  # as transformers computes it
  return config


if __name__ == '__main__':
  main(*sys.argv[1:])
