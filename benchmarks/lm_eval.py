"""Tokens a second of lm-evaluation-harness beside evaluating a split.

  python -m benchmarks.lm_eval --config=quickstart --json

Both are of one model with random parameters, in one process, a round of one
after a round of the other. The harness asks for multiple choice: contexts cut
from the split, of lengths from an eighth of `data.seq_len` on, each with four
answers. A round of it is all that `moe_jax eval --tasks` does once the data are
there: building requests, encoding, scoring and the metrics. Tokens are those
that are read, padding is none. Compiling is in no measured round.
"""

import itertools
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from moe_jax import cli, strict_json
from moe_jax.errors import UserError

if TYPE_CHECKING:
  from moe_jax.training.state import Setup

_CHOICES = 4
_NAME = 'choices'


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags that training does not have."""
  flags.DEFINE_boolean('json', False, 'print one JSON line', flag_values=values)
  flags.DEFINE_integer('requests', 2000, 'of a round', flag_values=values)
  flags.DEFINE_integer('rounds', 3, 'of each, measured', flag_values=values)


def run(config: ConfigDict, json: bool, requests: int, rounds: int) -> None:
  """Prints what `measure` returns."""
  # jax must not be imported before the command line has set the allocator.
  import jax

  from benchmarks import common

  jax.config.update('jax_enable_compilation_cache', False)
  common.show(measure(config, requests, rounds), json)


def measure(config: ConfigDict, requests: int, rounds: int) -> dict[str, Any]:
  """Times rounds of both after one that compiles.

  Returns:
    `tokens_per_second` of the harness and `tokens_per_second_split`, each at
    its median round; `ratio` (the median over rounds) of the first to the
    second; `first_seconds` and `first_seconds_split`, with compilation;
    `tokens` and `tokens_split` of a round; and where it ran.

  Raises:
    UserError: Anything is wrong with the config or a number.
  """
  import numpy as np

  from benchmarks import common
  from moe_jax.config import eval_batch_size
  from moe_jax.evaluation import task_scores, tasks
  from moe_jax.evaluation.harness import CheckpointLM
  from moe_jax.evaluation.perplexity import Perplexity
  from moe_jax.training import state

  if requests < _CHOICES or rounds < 1:
    raise UserError(
      f'--requests = {requests} must be at least {_CHOICES}, and --rounds ='
      f' {rounds} at least 1'
    )
  setup = state.from_config(config)
  params = setup.init()['params']
  with tempfile.TemporaryDirectory() as folder:
    tokens = _write(setup, requests // _CHOICES, Path(folder))
    loaded = tasks.load(_NAME, folder)
    model = CheckpointLM(setup, params)
    split = Perplexity(setup, config.eval.split)
    size = eval_batch_size(config) * config.data.seq_len
    batches = max(tokens // size, 1)

    def ask() -> int:
      task_scores.run_tasks(model, loaded, task_scores.TaskOptions(_NAME))
      return tokens

    def evaluate() -> int:
      return int(split(params, batches)[0].metrics['tokens'])

    timed = [
      [_timed(side) for side in (ask, evaluate)] for _ in range(1 + rounds)
    ]
  seconds = np.array([[side[0] for side in each] for each in timed])
  speeds = np.array([[side[1] for side in each] for each in timed]) / seconds
  ours, theirs = np.median(speeds[1:], axis=0).tolist()
  return {
    'benchmark': 'lm_eval',
    'tokens_per_second': ours,
    'tokens_per_second_split': theirs,
    'ratio': float(np.median(speeds[1:, 0] / speeds[1:, 1])),
    'first_seconds': float(seconds[0, 0]),
    'first_seconds_split': float(seconds[0, 1]),
    'tokens': timed[0][0][1],
    'tokens_split': timed[0][1][1],
    'requests': requests // _CHOICES * _CHOICES,
    'rounds': rounds,
  } | common.place()


def _timed(side: Any) -> tuple[float, int]:
  """Returns the seconds that a round takes, and the tokens it reads."""
  began = time.perf_counter()
  tokens = side()
  return time.perf_counter() - began, tokens


def _write(setup: 'Setup', count: int, folder: Path) -> int:
  """Writes so many questions, and returns the tokens of all requests."""
  import numpy as np

  from moe_jax.data import sources

  config, tokenizer = setup.config, setup.tokenizer
  assert tokenizer is not None
  documents = sources.open_documents(config.data, config.eval.split)
  rng = np.random.default_rng(0)
  longest, rows, total = config.data.seq_len, [], 0
  for number in itertools.cycle(range(len(documents))):
    if len(rows) == count:
      break
    length = int(rng.integers(longest // 8, longest + 1))
    ids = tokenizer.encode(documents[number][: 8 * length]).tolist()
    cut = max(length - 8, 1)
    # Half a character at the cut would not come back.
    context = tokenizer.decode(ids[:cut]).strip('\N{REPLACEMENT CHARACTER}')
    choices = [f'{number} or {n}'[:8] for n in range(_CHOICES)]
    if not context.strip():
      continue
    rows.append({'context': context, 'choices': choices, 'answer': 0})
    for choice in choices:
      total += len(tokenizer.encode(f'{context} {choice}'))
  (folder / 'data.jsonl').write_text('\n'.join(map(strict_json.dumps, rows)))
  task = {
    'task': _NAME,
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'test': str(folder / 'data.jsonl')}},
    'test_split': 'test',
    'output_type': 'multiple_choice',
    'doc_to_text': '{{context}}',
    'doc_to_choice': '{{choices}}',
    'doc_to_target': '{{answer}}',
  }
  (folder / 'task.yaml').write_text(strict_json.dumps(task))
  return total


if __name__ == '__main__':
  cli.main(run, define_flags, workdir=False)
