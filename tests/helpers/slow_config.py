"""A tiny run whose data, evaluations or saves take their time, as asked.

`--config=tests/helpers/slow_config.py:read=9,batch=0.2,save=8,wait=1`: seconds
for the data set, for each batch of an evaluation and for each save, and those
to wait for another run in the workdir.
"""

import time
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.data.sequences import TokenSequences
from moe_jax.data.sources import DATA_SOURCES, GivenTexts
from moe_jax.evaluation.perplexity import Perplexity
from moe_jax.registry import EVALUATIONS
from moe_jax.training import lock

_SECONDS = {'read': 0.0, 'batch': 0.0, 'save': 0.0, 'wait': 10.0}
_TEXTS = [f'document {i}: ' + 'abcdefgh ' * (20 + i) for i in range(40)]


@DATA_SOURCES.register('slow_texts')
def slow_texts(data: ConfigDict, **options: Any) -> GivenTexts:
  """Texts that are read slowly."""
  del data

  def texts() -> Iterator[str]:
    for text in _TEXTS:
      time.sleep(_SECONDS['read'] / len(_TEXTS))
      yield text

  splits = {'train': texts(), 'validation': iter(_TEXTS[:4])}
  return GivenTexts(splits, key='slow', **options)


@EVALUATIONS.register('slow')
class Slow(Perplexity):
  """The loss, slowly."""

  def _batches(self, sequences: TokenSequences) -> Any:
    rows, batches = super()._batches(sequences)

    def slowly() -> Iterator[Any]:
      for batch in batches:
        print('evaluating', flush=True)
        time.sleep(_SECONDS['batch'])
        yield batch

    return rows, slowly()


_wait = ocp.CheckpointManager.wait_until_finished


def _wait_slowly(manager: ocp.CheckpointManager) -> None:
  """Ends a save late, as a large one does."""
  _wait(manager)
  if _SECONDS['save']:
    print('saving', flush=True)
  time.sleep(_SECONDS['save'])


def get_config(names: str = '') -> ConfigDict:
  """Returns the config; `names` are KEY=SECONDS with commas between."""
  for each in filter(None, names.split(',')):
    name, seconds = each.split('=')
    _SECONDS[name] = float(seconds)
  ocp.CheckpointManager.wait_until_finished = _wait_slowly
  lock.PATIENCE = _SECONDS['wait']
  config = config_lib.get_config()
  changes = {
    'model.num_layers': 1,
    'model.hidden_size': 32,
    'model.num_heads': 2,
    'model.num_kv_heads': 2,
    'moe.num_experts': 4,
    'moe.expert_width': 16,
    'data.name': 'slow_texts',
    'data.seq_len': 32,
    'data.threads': 1,
    'train.batch_size': 4,
    'train.steps': 100_000,
    'train.log_every': 1,
    'checkpoint.every': 10,
    'eval.every': 10,
    'eval.evaluations': 'slow',
    'optimizer.warmup_steps': 4,
    'optimizer.decay_steps': 40,
  }
  config.update_from_flattened_dict(changes)
  return config
