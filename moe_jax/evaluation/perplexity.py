"""Loss, perplexity and bits per byte of a split, exact to the last token."""

import itertools
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.data.pipeline import TokenSequences, eval_batches
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.parallel import multihost
from moe_jax.training import run_dir, state
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.step import make_eval_step
from moe_jax.training.terminal import summary_table


def evaluate(
  config: ConfigDict,
  workdir: str,
  step: int | None = None,
  split: str | None = None,
) -> dict[str, float]:
  """Evaluates a checkpoint on a whole split, on any mesh.

  Prints a table, and writes DIR/evaluation/SPLIT-STEP.json; with
  `eval.disable_top` = r, SPLIT-STEP-without-top-r.json.

  Args:
    config: that the run was made with; mesh and evaluation keys may differ.
    workdir: of the run.
    step: of the checkpoint; None for the newest.
    split: of the data; None for `eval.split`.

  Returns:
    What `evaluate_split` returns, with `step`.

  Raises:
    UserError: anything wrong with config, data, workdir or step.
  """
  setup = multihost.first_process_first(lambda: state.from_config(config))
  split = split or config.eval.split
  with Checkpointer.open(
    workdir, config, setup.dictionary, read_only=True
  ) as store:
    sequences = multihost.first_process_first(
      lambda: TokenSequences.open(config.data, split, setup.tokenizer)
    )
    step = store.latest_step() if step is None else step
    wanted = {key: setup.abstract[key] for key in ('step', 'params')}
    restored, _ = store.restore(wanted, step)
    result = evaluate_split(
      make_eval_step(setup), restored['params'], sequences, config, setup.mesh
    )
  result = {'step': step} | result
  if multihost.is_main_process():
    _report(result, workdir, split)
  return result


def evaluate_split(
  eval_step: Callable[[Any, Any], dict[str, Any]],
  params: Any,
  sequences: TokenSequences,
  config: ConfigDict,
  mesh: jax.sharding.Mesh,
  max_batches: int = 0,
) -> dict[str, float]:
  """Adds up the loss over a split, every token predicted exactly once.

  A token is predicted from those before it in its window of `data.seq_len`;
  by a model with a memory, from its span as well. Its batches go on where the
  one before stopped, so the split is as many texts as a batch has rows.

  Args:
    eval_step: what `make_eval_step` returned.
    params: of the model.
    sequences: of the split.
    config: reads the batch size.
    mesh: where the parameters live.
    max_batches: stop after so many; 0 for the whole split.

  Returns:
    `loss` (nats per token), `perplexity` (e to that), `bits_per_byte` (of the
    text; the separators of documents are paid for, but are no bytes) and
    `tokens` (predicted); with `eval.disable_top`, that as `disabled_top`.
  """
  batch_size = config_lib.eval_batch_size(config)
  rows = multihost.Rows(mesh_lib.batch_sharding(mesh), batch_size)
  batches = eval_batches(
    sequences, batch_size=batch_size, rows=rows.local, order=config.data.order
  )
  nll, tokens, attention_state = 0.0, 0, None
  for batch in itertools.islice(batches, max_batches or None):
    sums = eval_step(params, rows.join(batch), attention_state)
    attention_state = sums['attention_state']
    # Python's float is float64: sums over many batches stay exact.
    nll += float(sums['nll'])
    tokens += int(sums['targets'])
  loss = nll / tokens
  bytes_per_token = sequences.num_bytes / sequences.num_tokens
  disabled = config.eval.disable_top
  return ({'disabled_top': disabled} if disabled else {}) | {
    'loss': loss,
    'perplexity': math.exp(loss) if loss < 700 else math.inf,
    'bits_per_byte': loss / math.log(2) / bytes_per_token,
    'tokens': tokens,
  }


def suffix(result: dict[str, float]) -> str:
  """`-without-top-r`, what a split's name ends in if experts were disabled."""
  disabled = result.get('disabled_top')
  return f'-without-top-{disabled}' if disabled else ''


def _report(result: dict[str, float], workdir: str, split: str) -> None:
  print(result_table([(split + suffix(result), result)]))
  name = re.sub(r'[^\w.+-]', '_', split)
  folder = os.path.join(workdir, 'evaluation')
  path = os.path.join(folder, f'{name}-{result["step"]}{suffix(result)}.json')
  os.makedirs(folder, exist_ok=True)
  row = {'split': split} | result
  run_dir.replace(path, json.dumps(row) + '\n')
  print(f'written to {path}')


def result_table(results: list[tuple[str, dict[str, float]]]) -> str:
  """Evaluations as a plain-text table, one row a split."""
  head = ['split', 'step', 'loss', 'perplexity', 'bits per byte', 'tokens']
  rows = [
    [
      split,
      str(result['step']),
      f'{result["loss"]:.4f}',
      f'{result["perplexity"]:.3f}',
      f'{result["bits_per_byte"]:.4f}',
      f'{result["tokens"]:,}',
    ]
    for split, result in results
  ]
  return summary_table([head, *rows])
