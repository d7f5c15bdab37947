"""Instruction data from files to steps: what a gradient is of, what is told."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import rmoe
from moe_jax.config import validate
from moe_jax.data import pipeline, tokenizers
from moe_jax.data.mixtures import Mixture
from moe_jax.errors import UserError
from moe_jax.evaluation.perplexity import Perplexity
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.planning.compiled import abstract_batch
from moe_jax.training import loop, record, state
from moe_jax.training.step import gradient
from tests.helpers import tiny

# Each example has letters of its own, in its prompt and in its response.
EXAMPLES = [('ab', 'cd'), ('efgh', 'i'), ('jk', 'lmno')]
FIXED = len('### User:\n\n\n### Assistant:\n')


@pytest.fixture
def config(tmp_path: pathlib.Path) -> ConfigDict:
  rows = [
    {
      'messages': [
        {'role': 'user', 'content': 10 * prompt},
        {'role': 'assistant', 'content': response},
      ]
    }
    for prompt, response in EXAMPLES
  ]
  (tmp_path / 'rows/train').mkdir(parents=True)
  content = '\n'.join(map(json.dumps, rows))
  (tmp_path / 'rows/train/a.jsonl').write_text(content)
  return tiny.config(
    **{
      'data.name': 'files',
      'data.path': str(tmp_path / 'rows'),
      'data.dir': str(tmp_path / 'prepared'),
      'data.format': 'chat',
      'data.order': 'packed',
      'data.seq_len': 128,
      'eval.split': 'train',
      'model.num_layers': 1,
      'model.tie_embeddings': False,
      'loss.balance_weight': 0.0,
      'train.batch_size': 2,
    }
  )


def _made(config: ConfigDict) -> loop.Prepared:
  """Returns what a run of one device is made of."""
  mesh = mesh_lib.make_mesh(
    dict.fromkeys(mesh_lib.MESH_AXES, 1), jax.devices()[:1]
  )
  tokenizer = tokenizers.ByteTokenizer()
  setup = state.setup(config, tokenizer.vocab_size, mesh)
  setup = dataclasses.replace(setup, tokenizer=tokenizer)
  mixture = Mixture.open(config.data, tokenizer, config.train.batch_size)
  return loop.Prepared(setup, mixture, [])


def _batch(made: loop.Prepared) -> dict[str, Any]:
  size = made.setup.config.train.batch_size
  batches = pipeline.eval_batches(
    made.mixture.sequences[0],
    batch_size=size,
    rows=range(size),
    order='packed',
  )
  return next(batches)


@pytest.mark.slow
def test_no_gradient_but_of_responses(config: ConfigDict) -> None:
  """Nor to an example from another one's response."""
  made = _made(config)
  batch, first = _batch(made), made.setup.init()
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    k: (v.shape, v.dtype) for k, v in abstract_batch(made.setup).items()
  }
  of = jax.jit(lambda batch: gradient(made.setup, first, batch)[:2])
  grads, metrics = of(batch)
  mask = batch['target_mask']
  assert mask.sum() == sum(len(response) + 1 for _, response in EXAMPLES)
  other = batch | {'targets': np.where(mask, batch['targets'], 7)}
  jax.tree.map(np.testing.assert_array_equal, (grads, metrics), of(other))

  # The response `i` and its end alone; the examples are side by side in rows.
  ids = batch['segment_ids']
  [(b, at)] = np.argwhere((batch['targets'] == ord('i')) & mask)
  assert ids[b].max() == 2
  own = (ids == ids[b, at]) & (np.arange(len(ids)) == b)[:, None]
  grads, _ = of(batch | {'target_mask': mask & own})
  reached = np.flatnonzero(np.abs(grads['embed_VD']).max(1))
  letters = {chr(i) for i in reached if i < 256}
  assert letters == set('### User:\n\n\n### Assistant:\nefghi')


def test_what_a_run_says_and_an_evaluation_counts(config: ConfigDict) -> None:
  made = _made(config)
  predicted = sum(len(response) + 1 for _, response in EXAMPLES)
  tokens = sum(FIXED + 10 * len(p) + len(r) + 1 for p, r in EXAMPLES)
  said = record.describe(made.setup, made.mixture)
  assert f'loss on {100 * predicted / tokens:.0f} % of tokens' in said
  assert 'longer than' not in said
  short = config.copy_and_resolve_references()
  short.data.seq_len = FIXED + 20 + 6  # as long as the last example
  [cut] = made.mixture.sequences
  cut.seq_len = short.data.seq_len
  cut.__dict__.pop('packing', None)
  said = record.describe(
    dataclasses.replace(made.setup, config=short), made.mixture
  )
  assert f'1 of 3 examples longer than data.seq_len = {cut.seq_len},' in said

  evaluation = Perplexity(made.setup, 'train')
  [result] = evaluation(made.setup.init()['params'])
  found = result.metrics
  assert found['tokens'] == predicted
  num_bytes = sum(len(response) for _, response in EXAMPLES)
  bits = found['loss'] * predicted / math.log(2) / num_bytes
  assert found['bits_per_byte'] == pytest.approx(bits, rel=1e-6)


def test_batches_without_a_target_are_refused(config: ConfigDict) -> None:
  """The first tokens of a stream are a prompt's."""
  config.data.order, config.data.seq_len = 'shuffled', 16
  made = _made(config)
  evaluation = Perplexity(made.setup, 'train')
  with pytest.raises(UserError, match='eval.batches = 1: .*no response to'):
    evaluation(made.setup.init()['params'], 1)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data.name': 'python_stdlib'}, "set data.name = 'files' or 'huggingf"),
    ({'data.text_key': 'body'}, "'body' is not read with data.format = 'chat'"),
    ({'data.format': 'alpacas'}, "did you mean 'alpaca'"),
  ],
)
def test_formats_that_contradict(
  changes: dict[str, str], message: str, config: ConfigDict
) -> None:
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message):
    validate(config, 1)


def test_fine_tuning_says_what_to_give(tmp_path: pathlib.Path) -> None:
  config = rmoe.get_config('sft')
  given = {'train.init_from': '/a/run', 'data.path': '/alpaca_data.json'}
  options = {
    'train.init_from': '--config.train.init_from=WORKDIR',
    'data.path': '--config.data.path=PATH',
  }
  for missing in (list(given), ['train.init_from'], ['data.path']):
    made = config.copy_and_resolve_references()
    known = {key: given[key] for key in given if key not in missing}
    made.update_from_flattened_dict(known)
    with pytest.raises(UserError) as caught:
      loop.train(made, str(tmp_path / 'run'))
    said = str(caught.value)
    verb = 'are' if len(missing) == 2 else 'is'
    assert said.startswith(f'{" and ".join(missing)} {verb} not given')
    assert '\n' not in said and not (tmp_path / 'run').exists()
    for key, option in options.items():
      assert (option in said) == (key in missing)
  made.update_from_flattened_dict(given)
  validate(made, 8)
  setup = state.from_config(made)
  assert 'target_mask' in abstract_batch(setup)
  assert (made.data.format, made.data.order) == ('alpaca', 'packed')
  with pytest.raises(UserError, match='data.path is not given: add'):
    pipeline.TokenSequences.open(config.data, 'train', setup.tokenizer)
