"""Carries out the studies of docs/evidence.md, and prints its tables.

  python -m benchmarks.evidence                       the studies, with commands
  python -m benchmarks.evidence --study=code --workdir=runs/code
  python -m benchmarks.evidence --tables              what is kept of them
  python -m benchmarks.evidence --spread              logits before training

A study is a comparison, after which every run is evaluated without the best
expert of every token, and the first seed of every variant is analysed. It takes
hours on two cores; the same command goes on where it was stopped. What is kept
of it, evidence/STUDY.json beside the other results, is all that the tables are
made of.
"""

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from moe_jax import exits, runtime, strict_json
from moe_jax.analysis.comparison import FILE, summarise
from moe_jax.config import loading
from moe_jax.errors import UserError, choose
from moe_jax.pretrained import Model
from moe_jax.programs import pool
from moe_jax.routing.selection import Routing
from moe_jax.training import state

KEPT = Path(__file__).parent / 'results' / 'cpu-2-cores' / 'evidence'
# What is kept of compare.json, and of each of its rows.
_OF_COMPARISON = ('config', 'overrides', 'match', 'split', 'seeds', 'sweep')
_OF_ROW = (
  *('variant', 'about', 'changes', 'matched', 'parameters'),
  *('active_parameters', 'flops_per_token', 'swept', 'runs'),
)


class Study(NamedTuple):
  """A comparison of variants.

  Attributes:
    title: What is compared, on what.
    variants: The rows; the table has differences to the first.
    flags: The other flags of `moe_jax compare`.
  """

  title: str
  variants: tuple[str, ...]
  flags: tuple[str, ...] = ('--config=quickstart:tiny', '--seeds=5')

  def command(self, workdir: str) -> list[str]:
    """Returns the arguments of `moe_jax` that carry its comparison out."""
    variants = ','.join(self.variants)
    equal = 'linear' if 'linear' in self.variants else self.variants[0]
    return [
      *('compare', *self.flags, f'--variants={variants}'),
      *(f'--baseline={equal}', '--match=parameters', f'--workdir={workdir}'),
    ]


_METHODS = ('linear', 'rmoe', 'cartesian', 'both')
_TINY = Study._field_defaults['flags']
# The last is `init_std / sqrt(2 num_layers)`, as GPT-2 has it.
_NORMS = (
  *('+model.norm_place=post', '+model.norm=layer'),
  '+model.residual_std=0.0289',
)
STUDIES = {
  'small': Study(
    'The quickstart, on source code',
    _METHODS,
    ('--config=quickstart', '--seeds=5'),
  ),
  'code': Study('A quarter of it, on source code', _METHODS),
  'prose': Study(
    'The same, on prose',
    _METHODS,
    (*_TINY, '--config.data.name=python_docs', '--split=validation+test'),
  ),
  'start': Study(
    'How routers start and learn, on source code',
    (
      *('rmoe', 'rmoe+router.gate_std=0.1', 'rmoe+optimizer.router_rate=1'),
      *('linear', 'linear+optimizer.router_rate=1'),
    ),
  ),
  'baselines': Study(
    "The papers' baselines, on source code",
    (
      *('linear', 'linear+shared', 'linear+fine_grained', 'linear+top_p'),
      *('linear+hash', 'linear+xmoe', 'linear+cosine', 'linear+random'),
    ),
  ),
  'ablations': Study(
    "RMoE's ablations, on source code",
    (
      *('rmoe', 'rmoe+np', 'rmoe+detach', 'rmoe+np+r0.5', 'rmoe+s_proj'),
      *('rmoe+rnn', 'rmoe+lstm', 'linear'),
    ),
  ),
  **{
    f'depth{layers}': Study(
      f'{layers} layers instead of 6, on source code',
      ('linear', 'rmoe', 'cartesian'),
      (_TINY[0], f'--config.model.num_layers={layers}', '--seeds=3'),
    )
    for layers in (2, 4, 8)
  },
  'rates': Study(
    'Each at the best of three learning rates, on source code',
    ('linear', 'rmoe', 'rmoe+s_proj', 'cartesian'),
    (
      *(_TINY[0], '--seeds=3'),
      '--sweep=optimizer.learning_rate:2e-3,4e-3,8e-3',
    ),
  ),
  'projector': Study(
    'One projector for all layers in the quickstart, on source code',
    ('rmoe', 'rmoe+s_proj'),
    ('--config=quickstart', '--seeds=3'),
  ),
  'steps': Study(
    'Four times the steps, on source code',
    ('linear', 'rmoe', 'cartesian'),
    (_TINY[0], '--config.train.steps=4000', '--seeds=3'),
  ),
  'norms': Study(
    'Norms and the start of the residual stream, on source code',
    tuple(
      f'{router}{change}'
      for router, changes in {
        'linear': ('', *_NORMS),
        'rmoe': ('', _NORMS[-1]),
        'cartesian': ('', *_NORMS),
      }.items()
      for change in changes
    ),
    (_TINY[0], '--seeds=3'),
  ),
  'settings': Study(
    'Norms and the balance loss, one change at a time, on source code',
    (
      *('rmoe', 'rmoe+model.norm_place=post', 'rmoe+model.norm=layer'),
      *('rmoe+loss.balance_weight=0', 'rmoe+loss.balance_weight=0.1'),
      'linear',
    ),
    (_TINY[0], '--seeds=3'),
  ),
}


def main(arguments: Sequence[str] | None = None) -> int:
  """Does what the command line asks for; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.evidence',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--study', help=f'one of {", ".join(STUDIES)}')
  parser.add_argument('--workdir', help='where the runs of the study are kept')
  parser.add_argument(
    '--tables', action='store_true', help='print what is kept of the studies'
  )
  parser.add_argument(
    '--spread',
    action='store_true',
    help='print how far the first logits of routers are apart',
  )
  flags = parser.parse_args(arguments)
  runtime.silence_plugins()
  try:
    if flags.tables:
      print('\n'.join(tables()))
    elif flags.spread:
      print('\n'.join(spreads()))
    elif flags.study:
      _carry_out(choose('--study', flags.study, STUDIES), flags.workdir)
    else:
      for name, study in STUDIES.items():
        print(f'{name}: {study.title}')
        print(f'  moe_jax {" ".join(study.command("DIR"))}')
  except UserError as error:
    print('error:', ' '.join(str(error).split()), file=sys.stderr)
    return 2
  return 0


def tables() -> list[str]:
  """Returns the tables of what is kept, in Markdown, a study each."""
  found = []
  for name, study in STUDIES.items():
    path = KEPT / f'{name}.json'
    if path.exists():
      kept = json.loads(path.read_text('utf-8'))
      lines = [f'**{study.title}**', '', *_losses(kept), '', *_swept(kept)]
      lines += _routing(kept)
      found.append('\n'.join(lines) + '\n')
  return found


def spreads() -> list[str]:
  """Returns a table, in Markdown, of routers before training.

  It has the standard deviation of a token's logits over the experts, and the
  entropy of its distribution in nats: means over tokens and routers.
  """
  lines = [
    '| routers before training | deviation of logits | entropy |',
    '|---|---|---|',
  ]
  for preset in ('small', 'tiny'):
    for variant in ('linear', 'rmoe', 'rmoe,router.gate_std={init_std}'):
      argument = f'quickstart:{preset},{variant}'
      init_std = loading.load(f'quickstart:{preset}').model.init_std
      argument = argument.format(init_std=init_std)
      routing = _first_routing(loading.load(argument))
      logits, p = np.asarray(routing.logits_TN), routing.probabilities_TN
      entropy = -(p * np.log(p)).sum(-1).mean()
      lines.append(
        f'| `{argument}` | {logits.std(-1).mean():.2f} | {entropy:.2f} |'
      )
  return lines


def _first_routing(config: ConfigDict) -> Routing:
  """Returns where a model that is not trained sends the bytes of a text."""
  setup = state.from_config(config)
  config.unlock()
  config.model.vocab_size = setup.vocab_size
  text = np.frombuffer(' '.join(sys.copyright.split()).encode(), np.uint8)
  model = Model(config, setup.init(None)['params'])
  routing = model.routing(text.astype(np.int32))
  assert routing is not None  # all of them have MoE layers
  return routing


def keep(name: str, workdir: str) -> dict[str, Any]:
  """Keeps what the tables need of a finished comparison, and returns it.

  Seeds of the study that were kept before, of rows of the same changes and
  numbers of parameters, are joined: pairs are of one seed, so they may come
  from different machines.

  Args:
    name: The study.
    workdir: The directory of its comparison; rows of other studies in it are
      left out.

  Raises:
    UserError: There is no such comparison.
  """
  path = Path(workdir, FILE)
  if not path.exists():
    raise UserError(f'{path} is missing: give the --workdir of the comparison')
  result = json.loads(path.read_text('utf-8'))
  kept = {key: result[key] for key in _OF_COMPARISON}
  found = {row['variant']: row for row in result['rows']}
  path = KEPT / f'{name}.json'
  earlier = json.loads(path.read_text('utf-8')) if path.exists() else {}
  before = {row['variant']: row for row in earlier.get('rows', ())}
  rows = [
    _joined(
      {key: found[variant][key] for key in _OF_ROW}
      | {
        'without_best': _without_best(found[variant], workdir),
        'routing': _analysed(found[variant], workdir),
      },
      before.get(variant),
    )
    for variant in STUDIES[name].variants
    if variant in found
  ]
  scores = [
    {run['seed']: run['bits_per_byte'] for run in row['runs']} for row in rows
  ]
  kept['rows'] = [
    row | summarise(own, scores[0] if i else None)
    for i, (row, own) in enumerate(zip(rows, scores, strict=True))
  ]
  kept['seeds'] = sorted(set(kept['seeds']).union(*scores))
  KEPT.mkdir(parents=True, exist_ok=True)
  path.write_text(strict_json.dumps(kept, indent=1) + '\n', 'utf-8')
  return kept


def _joined(
  row: dict[str, Any], earlier: Mapping[str, Any] | None
) -> dict[str, Any]:
  """Returns a row with the seeds that were kept of it earlier."""
  same = ('changes', 'parameters')
  if earlier is None or any(row[key] != earlier[key] for key in same):
    return row
  own = {run['seed'] for run in row['runs']}
  for key in ('runs', 'without_best'):
    more = [run for run in earlier[key] if run['seed'] not in own]
    row[key] = sorted([*row[key], *more], key=lambda run: run['seed'])
  if row['runs'] and row['runs'][0]['seed'] not in own:
    row['routing'] = earlier['routing']  # analyses are of the first seed
  return row


def _carry_out(name: str, workdir: str | None) -> None:
  """Compares, evaluates and analyses; what is there already stays."""
  if not workdir:
    raise UserError('--workdir is missing: where the runs are kept')
  command = [sys.executable, '-m', 'moe_jax', *STUDIES[name].command(workdir)]
  if subprocess.run(command, check=False).returncode:
    raise UserError('the comparison did not end well; see above')
  jobs = list(_jobs(workdir))
  with pool.Pool(pool.shares(None, max(len(jobs), 1)), {}) as programs:
    for job, error in programs.run(jobs):
      if error:
        raise UserError(f'{job.name}: {error}')
  keep(name, workdir)
  print('\n'.join(tables()))


def _jobs(workdir: str) -> Iterator[pool.Job]:
  """Yields what is still to be evaluated and analysed of finished runs."""
  result = json.loads(Path(workdir, FILE).read_text('utf-8'))
  for row in result['rows']:
    for run in row['runs']:
      folder = Path(workdir, run['workdir'])
      commands = []
      if _result(folder, 'without-top-1') is None:
        commands.append(
          [
            *('eval', f'--workdir={folder}', f'--split={result["split"]}'),
            '--config.eval.disable_top=1',
          ]
        )
      first = run['seed'] == result['seeds'][0]
      if first and not list(folder.glob('analysis/*.json')):
        commands.append(['analyze', str(folder), f'--split={result["split"]}'])
      if commands:
        log = str(folder / 'log.txt')
        yield pool.Job(run['workdir'], commands, log)


def _result(folder: Path, variant: str) -> dict[str, Any] | None:
  """Returns what an evaluation of a run found; None before it is done."""
  for path in sorted(folder.glob(f'evaluation/*{variant}.json')):
    with contextlib.suppress(ValueError):
      return json.loads(path.read_text('utf-8'))
  return None


def _without_best(
  row: Mapping[str, Any], workdir: str
) -> list[dict[str, float]]:
  """Returns each seed's perplexity without every token's best expert."""
  found = []
  for run in row['runs']:
    result = _result(Path(workdir, run['workdir']), 'without-top-1')
    if result:
      found.append(
        {
          'seed': run['seed'],
          'perplexity': result['perplexity'],
          'usual': math.exp(run['loss']),
        }
      )
  return found


def _analysed(row: Mapping[str, Any], workdir: str) -> dict[str, float] | None:
  """Returns the means over routers of what was found of the first seed."""
  if not row['runs']:
    return None
  folder = Path(workdir, row['runs'][0]['workdir'], 'analysis')
  for path in sorted(folder.glob('*.json')):
    found = json.loads(path.read_text('utf-8'))
    information = found['mutual_information']
    size = len(information)
    pairs = [information[i][j] for i in range(size) for j in range(i)]
    return {
      'mutual_information': statistics.fmean(pairs),
      'gate_entropy': statistics.fmean(found['gate_entropy']['mean']),
      'inner_balance': statistics.fmean(found['inner_balance']['median']),
      'outer_balance': statistics.fmean(found['outer_balance']['median']),
      'expert_similarity': statistics.fmean(
        found['expert_similarity']['measured']
      ),
    }
  return None


def _losses(kept: Mapping[str, Any]) -> list[str]:
  """Returns the table of the losses."""
  lines = [
    '| variant | parameters | active | bits per byte | difference, 95 % | p |'
    ' seeds |',
    '|---|---|---|---|---|---|---|',
  ]
  for row in kept['rows']:
    deviation = row['deviation']
    score = f'{row["mean"]:.3f}' if row['runs'] else ''
    score += f' ± {deviation:.3f}' if deviation is not None else ''
    difference = ''
    if row['interval']:
      low, high = row['interval']
      difference = f'{row["difference"]:+.3f} [{low:+.3f}, {high:+.3f}]'
    p_value = '' if row['p_value'] is None else f'{row["p_value"]:.2g}'
    lines.append(
      f'| `{row["variant"]}` | {row["parameters"] / 1e6:.3f}M'
      f' | {row["active_parameters"] / 1e6:.3f}M | {score} | {difference}'
      f' | {p_value} | {len(row["runs"])} |'
    )
  return lines


def _swept(kept: Mapping[str, Any]) -> list[str]:
  """Returns the table of a sweep, with an empty line; none without one."""
  if not kept.get('sweep'):
    return []
  values = list(kept['rows'][0]['swept']['results'])
  lines = [
    f'| bits per byte of seed {kept["seeds"][0]}, `{kept["sweep"]["key"]}` |'
    f' {" | ".join(values)} | the best |',
    '|---' * (len(values) + 2) + '|',
  ]
  for row in kept['rows']:
    swept = row['swept']
    cells = [f'{swept["results"][value]:.3f}' for value in values]
    cells.append(str(swept['value']))
    lines.append(f'| `{row["variant"]}` | {" | ".join(cells)} |')
  return [*lines, '']


def _routing(kept: Mapping[str, Any]) -> list[str]:
  """Returns the table of what routers do."""
  lines = [
    '| variant | perplexity, best expert left out | over the usual one'
    ' | mutual information | gate entropy | inner balance | outer balance'
    ' | similarity of experts |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for row in kept['rows']:
    cells = ['', '']
    if row['without_best']:
      without = [each['perplexity'] for each in row['without_best']]
      usual = [each['usual'] for each in row['without_best']]
      ratios = (a / b for a, b in zip(without, usual, strict=True))
      cells = [
        f'{statistics.fmean(without):.2f}',
        f'{statistics.fmean(ratios):.2f}',
      ]
    found = row['routing'] or {}
    cells += [
      f'{found[key]:.3f}' if key in found else ''
      for key in (
        *('mutual_information', 'gate_entropy', 'inner_balance'),
        *('outer_balance', 'expert_similarity'),
      )
    ]
    lines.append(f'| `{row["variant"]}` | {" | ".join(cells)} |')
  return lines


if __name__ == '__main__':
  exits.exit_with(lambda: sys.exit(main()))
