"""Makes one HTML page of runs: curves, comparisons, routing, every token.

  moe_jax report runs/quickstart
  moe_jax report runs/a runs/b --output=both.html
  moe_jax report comparisons/routers

A directory is that of a run, or of a comparison, which has a compare.json.
The page needs no network, and opens from disk. What was not measured is left
out, with the command that adds it. Needs the extra `eval`.
"""

import argparse
import base64
import dataclasses
import functools
import gzip
import importlib.metadata
import importlib.resources
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_jax import disk, exits, strict_json
from moe_jax.errors import UserError, said
from moe_jax.files import check_output, expand, read_json

try:
  import altair
  import jinja2
  import vl_convert
  from altair.utils.schemapi import debug_mode
except ImportError as error:
  raise UserError(
    f"reports need the package {error.name}: pip install 'moe_jax[eval]'"
  ) from error

from moe_jax.analysis import charts, runs
from moe_jax.analysis.charts import Chart, Palette
from moe_jax.analysis.runs import Variant, Workdir

_LEVELS = 255  # a probability of the passage is one of so many


@dataclasses.dataclass(frozen=True)
class Subject:
  """What a report is about.

  Attributes:
    variants: The runs, by what they differ in beside their seeds.
    comparisons: The compare.json of every comparison.
    notes: What is not there.
  """

  variants: Sequence[Variant]
  comparisons: Sequence[Mapping[str, Any]]
  notes: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Panel:
  """Charts that belong together.

  Attributes:
    name: The name of its place in the page.
    title: The heading.
    about: What it shows and where it is from, a sentence or two.
    charts: The charts.
    choices: The routers or layers that its maps can be of.
    notes: What is left out, and what would add it.
  """

  name: str
  title: str
  about: str
  charts: Sequence[Chart]
  choices: Sequence[str] = ()
  notes: Sequence[str] = ()


def main(arguments: Sequence[str] | None = None) -> int:
  """Writes the report that the command line asks for; returns the status."""
  parser = argparse.ArgumentParser(
    prog='moe_jax report',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'directory', nargs='+', help='of a run, or of a comparison'
  )
  parser.add_argument('--output', help='the page; DIRECTORY/report.html')
  flags = parser.parse_args(arguments)
  try:
    directories = [expand(each) for each in flags.directory]
    output = os.path.join(directories[0], 'report.html')
    if flags.output:
      output = expand(flags.output)
      check_output('--output', output, 'report.html')
    text = page(read(directories))
    _save(text, output)
  except UserError as error:
    print('error:', said(error), file=sys.stderr)
    return 2
  print(f'written to {output} ({len(text) / 1e6:.1f} MB)')
  return 0


def read(directories: Sequence[str]) -> Subject:
  """Reads runs and comparisons.

  Args:
    directories: Workdirs, and directories with a compare.json.

  Raises:
    UserError: One is neither, or holds what cannot be read.
  """
  workdirs: list[Workdir] = []
  names: list[str | None] = []
  comparisons, notes = [], []
  paths = [os.path.join(each, 'compare.json') for each in directories]
  several = sum(map(os.path.exists, paths)) > 1
  for directory, path in zip(directories, paths, strict=True):
    if not os.path.exists(path):
      workdirs.append(runs.read_workdir(directory))
      names.append(None)
      continue
    name = os.path.basename(os.path.abspath(directory))
    comparison = _read_comparison(path, name, f'{name}: ' if several else '')
    comparisons.append(comparison)
    for row in comparison['rows']:
      for run in row['runs']:
        try:
          workdir = os.path.join(directory, run['workdir'])
          workdirs.append(runs.read_workdir(workdir))
        except UserError as error:
          notes.append(f'{row["variant"]}, seed {run["seed"]}: {error}')
          continue
        names.append(row['variant'])
  if not workdirs:
    raise UserError(f'{directories[0]}: no run of the comparison can be read')
  return Subject(runs.variants(workdirs, names), comparisons, notes)


def page(subject: Subject) -> str:
  """Returns the page, whole."""
  # Altair holds every part of a chart against its schema, which takes longer
  # than all else. What is wrong does not become Vega.
  with debug_mode(False):
    return _page(subject)


def _page(subject: Subject) -> str:
  variants = subject.variants
  compared = [row for each in subject.comparisons for row in each['rows']]
  names = [variant.name for variant in variants]
  names += [row['variant'] for row in compared]
  palette = Palette(list(dict.fromkeys(names)))
  sections = {
    'curves': _curves(variants, palette),
    'load': _load(variants),
    'routing': _routing(variants, palette),
  }
  comparisons = [
    _comparison(comparison, palette, index)
    for index, comparison in enumerate(subject.comparisons)
  ]
  sections['comparison'] = [panel for panel, _ in comparisons]
  specs: dict[str, dict[str, Any]] = {}
  for panels in sections.values():
    for panel in panels:
      for number, chart in enumerate(panel.charts):
        specs[f'{panel.name}-{number}'] = _compiled(chart)
  passages = _passages(variants)
  files = {
    name: importlib.resources.files('moe_jax.analysis')
    .joinpath('page', name)
    .read_text('utf-8')
    for name in ('page.html', 'page.css', 'page.js', 'explorer.js')
  }
  environment = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters |= {'number': _number, 'shown': shown}
  return environment.from_string(files['page.html']).render(
    title=', '.join(variant.name for variant in variants[:4])
    + (' ...' if len(variants) > 4 else ''),
    variants=variants,
    colours=palette.colours,
    rows=[
      _overview(variant, run, compared)
      for variant in variants
      for run in variant.runs
    ],
    later=palette.later,
    commands=_commands(variants),
    notes=subject.notes,
    sections=sections,
    comparisons=[row for _, row in comparisons],
    differences=differences(variants),
    robustness=robustness(variants),
    unanalysed=[
      f'moe_jax analyze {shlex.quote(variant.runs[0].path)}'
      for variant in variants
      if not variant.analysed
    ],
    passages=passages,
    vocabularies=[
      (passage['name'], index)
      for index, passage in enumerate(passages)
      if passage['vocabulary']
    ],
    axes=_axes(variants),
    measures=_measures(variants),
    unrobust=_unrobust(variants),
    metric_words=lambda each: each.get('metric', '').replace('_', ' '),
    specs=_packed(specs),
    style=files['page.css'],
    scripts=files['page.js'] + files['explorer.js'],
    bundle=_bundle(),
    version=importlib.metadata.version('moe_jax'),
  )


def differences(variants: Sequence[Variant]) -> dict[str, list[Any]]:
  """Returns the keys of the configs that differ, with each variant's value.

  A variant is taken at its first seed, and `seed` is left out; a key that a
  config lacks is None.
  """
  configs = [variant.runs[0].config for variant in variants]
  keys = dict.fromkeys(key for config in configs for key in config)
  table = {key: [config.get(key) for config in configs] for key in keys}
  return {
    key: values
    for key, values in table.items()
    if key != 'seed' and any(value != values[0] for value in values)
  }


def robustness(variants: Sequence[Variant]) -> list[dict[str, Any]]:
  """Returns what disabling the best experts does to the perplexity.

  One row for each evaluation with `eval.disable_top`, with the perplexity of
  the same split and step without it, where that was evaluated too
  (CartesianMoE, table 4).
  """
  rows = []
  for variant in variants:
    for run in variant.runs:
      usual = {
        (row.get('split'), row.get('step')): float(row['perplexity'])
        for row in run.evaluations
        if not row.get('disabled_top') and 'perplexity' in row
      }
      for row in run.evaluations:
        if not row.get('disabled_top') or 'perplexity' not in row:
          continue
        full = usual.get((row['split'], row['step']))
        without = float(row['perplexity'])
        rows.append(
          {
            'variant': variant.name,
            'seed': run.seed,
            'split': row['split'],
            'step': row['step'],
            'disabled': row['disabled_top'],
            'full': full,
            'without': without,
            'ratio': without / full if full else None,
          }
        )
  return rows


def shown(text: str) -> str:
  """Returns the text of a token so that every character of it is seen.

  Blanks and line ends become their symbols, control characters those of
  Unicode's control pictures, and what is no text a replacement character.
  """
  symbols = {'\n': '⏎', '\t': '⇥', ' ': '␣', '\x7f': '␡'}

  def symbol(letter: str) -> str:
    if letter in symbols:
      return symbols[letter]
    if ord(letter) < 32:
      return chr(0x2400 + ord(letter))
    if 0xD800 <= ord(letter) < 0xE000 or 0x80 <= ord(letter) < 0xA0:
      return '\ufffd'
    return letter

  return ''.join(map(symbol, text))


# The panels.


def _curves(variants: Sequence[Variant], palette: Palette) -> list[Panel]:
  splits = dict.fromkeys(
    split
    for variant in variants
    for run in variant.runs
    for split in run.run.evaluations
  )
  found = [charts.training_curve(variants, palette)]
  found[0] = dataclasses.replace(found[0], title='training loss')
  for split in splits:
    chart = charts.evaluation_curve(variants, palette, split)
    if chart:
      found.append(dataclasses.replace(chart, title=split))
  notes = []
  if len(found) == 1:
    notes.append('No evaluation during training: --config.eval.every=N.')
  without = [
    variant.name for variant in variants if not variant.runs[0].flops_per_token
  ]
  if without:
    notes.append(
      f'The FLOPs of a token of {", ".join(without)} are not in run.json, so'
      ' there is no curve over FLOPs.'
    )
  several = any(len(variant.runs) > 1 for variant in variants)
  about = (
    'Means over seeds, with bands of a standard deviation.'
    if several
    else 'Smooth lines are means over a fifteenth of the points.'
  )
  return [Panel('curves', 'Curves', about, found, notes=notes)]


def _comparison(
  comparison: Mapping[str, Any], palette: Palette, index: int
) -> tuple[Panel, dict[str, Any]]:
  """Returns the charts of a comparison, and what its table says."""
  found = [
    charts.comparison_dots(comparison, palette),
    charts.comparison_differences(comparison, palette),
    charts.sweep(comparison, palette) if comparison.get('sweep') else None,
  ]
  match = comparison.get('match', 'none')
  about = (
    f'{comparison.get("config", "")}; baseline {comparison["baseline"]};'
    f' matched by {match}; split {comparison.get("split", "")}.'
  )
  panel = Panel(
    f'comparison{index}',
    f'Comparison {comparison["name"]}',
    about,
    [chart for chart in found if chart],
  )
  rows = [
    {**row, 'seconds': _mean([run.get('seconds') for run in row['runs']])}
    for row in comparison['rows']
  ]
  failures = [
    f'{row["variant"]}, seed {failed["seed"]}, failed: {failed["error"]}'
    for row in comparison['rows']
    for failed in row.get('failed') or []
  ]
  return panel, {
    **comparison,
    'panel': panel,
    'rows': rows,
    'failures': failures,
  }


def _load(variants: Sequence[Variant]) -> list[Panel]:
  firsts = {variant.name: variant.runs[0] for variant in variants}
  counted = {
    name: run for name, run in firsts.items() if run.run.counts_PWSN.size
  }
  maps = [
    dataclasses.replace(charts.load_map(run), title=name)
    for name, run in counted.items()
  ]
  entropies = [
    dataclasses.replace(charts.entropy_curve(run), title=name)
    for name, run in firsts.items()
    if run.run.entropy_PW.size
  ]
  missing = [name for name in firsts if name not in counted]
  notes = []
  if missing:
    notes.append(
      f'No expert_counts in metrics.jsonl of {", ".join(missing)}: a dense'
      ' model, or a run from before they were logged; moe_jax train logs them.'
    )
  return [
    Panel(
      'load',
      'Load of the experts over training',
      'Assignments to each expert, relative to an even share.',
      maps,
      notes=notes,
    ),
    Panel(
      'entropy',
      'Entropy of the routers over training',
      'Mean per layer, in nats per token; log N is uniform.',
      entropies,
    ),
  ]


def _routing(variants: Sequence[Variant], palette: Palette) -> list[Panel]:
  """Returns the panels of the analyses; what is missing is a note in one."""
  analyses = {
    variant.name: variant.analysed.analysis
    for variant in variants
    if variant.analysed and variant.analysed.analysis
  }
  paths = {
    variant.name: variant.analysed.path
    for variant in variants
    if variant.analysed
  }
  if not analyses:
    return []
  panels = []
  for name, title, about, make in _PANELS:
    key, _, part = name.partition('.')
    having = {
      variant: analysis
      for variant, analysis in analyses.items()
      if _has(analysis, key, part)
    }
    missing = [variant for variant in analyses if variant not in having]
    notes = []
    if missing and name not in _ONLY_SOME:
      commands = ', '.join(
        f'moe_jax analyze {shlex.quote(paths[variant])}' for variant in missing
      )
      notes.append(f'Not measured of {", ".join(missing)}: {commands}.')
    if not having and not notes:
      continue
    made = make(having, palette) if having else ([], ())
    place = name.replace('.', '-').replace('_', '-')
    panels.append(Panel(place, title, about, made[0], made[1], notes))
  return panels


def _has(analysis: Mapping[str, Any], key: str, part: str) -> bool:
  """Returns whether an analysis has a key, and that part of it."""
  value = analysis.get(key)
  if value is not None and part:
    value = value.get(part)
  return value is not None and value != [] and _says(value)


def _says(value: Any) -> bool:
  """Returns whether there is anything but null in nested lists."""
  if isinstance(value, list):
    return any(_says(item) for item in value)
  return value is not None


_Analyses = Mapping[str, Mapping[str, Any]]
_Made = tuple[list[Chart], Sequence[str]]


def _each(
  chart: Callable[[Mapping[str, Any]], Chart],
  choices: Callable[[Mapping[str, Any]], Sequence[str]] = lambda _: (),
) -> Callable[[_Analyses, Palette], _Made]:
  """Returns the maker of a panel with a chart for every variant."""

  def make(analyses: _Analyses, palette: Palette) -> _Made:
    found = [
      dataclasses.replace(chart(analysis), title=name)
      for name, analysis in analyses.items()
    ]
    longest = max((choices(each) for each in analyses.values()), key=len)
    return found, longest if len(longest) > 1 else ()

  return make


def _by_depth(
  title: str,
  values: Callable[[Mapping[str, Any]], Any],
  **options: Any,
) -> Callable[[_Analyses, Palette], _Made]:
  """Returns the maker of a panel with one chart over the depth."""

  def make(analyses: _Analyses, palette: Palette) -> _Made:
    return [charts.over_depth(analyses, palette, title, values, **options)], ()

  return make


def _mutual_information(analyses: _Analyses, palette: Palette) -> _Made:
  most = charts.most_mutual_information(list(analyses.values()))
  return _each(lambda each: charts.mutual_information(each, most))(
    analyses, palette
  )


def _norms(analyses: _Analyses, palette: Palette) -> _Made:
  found = []
  for name, analysis in analyses.items():
    for of in ('experts', 'router'):
      if _says(analysis['norms'].get(of)):
        title = f'{name}: {of}'
        chart = charts.norms(analysis, of, palette.colours[name])
        found.append(dataclasses.replace(chart, title=title))
  return found, ()


def _gradients(analyses: _Analyses, palette: Palette) -> _Made:
  found = []
  for name, analysis in analyses.items():
    for of, values in analysis['checkpoints']['gradient_norm'].items():
      if _says(values):
        title = f'{name}: {of.replace("_", " ")}'
        chart = charts.over_checkpoints(analysis, values, 'gradient norm')
        found.append(dataclasses.replace(chart, title=title))
  return found, ()


def _over_checkpoints(
  key: str, title: str
) -> Callable[[_Analyses, Palette], _Made]:
  return _each(
    lambda each: charts.over_checkpoints(each, each['checkpoints'][key], title)
  )


# Keys of an analysis that are null where the model has no such thing.
_ONLY_SOME = ('pairs',)
_PANELS: list[tuple[str, str, str, Callable[[_Analyses, Palette], _Made]]] = [
  (
    'mutual_information',
    'Mutual information between routers',
    'How much the scores of one router say about those of another (RMoE,'
    ' fig. 3). The diagonal is the entropy of a router’s own scores, and may'
    ' lie beyond the scale.',
    _mutual_information,
  ),
  (
    'agreement.below',
    'Agreement with the router below',
    'Share of a token’s experts that were also chosen by the router below;'
    ' dashed is chance.',
    _by_depth(
      'share of the chosen',
      lambda each: each['agreement']['below'],
      reference=lambda each: each['agreement']['chance'],
      reference_name='chance',
    ),
  ),
  (
    'gate_entropy',
    'Entropy of the gates',
    'Densities over tokens, a line per router (RMoE, fig. 4).',
    _each(charts.gate_entropy),
  ),
  (
    'inner_balance',
    'Inner balance',
    'The highest score over the second, medians and quartiles over tokens'
    ' (RMoE, table 8).',
    _by_depth(
      'first score / second',
      lambda each: each['inner_balance']['median'],
      spread=lambda each: each['inner_balance']['quartiles'],
    ),
  ),
  (
    'outer_balance',
    'Outer balance',
    'The sum of the chosen scores, medians and quartiles over tokens (RMoE,'
    ' table 8).',
    _by_depth(
      'sum of the chosen scores',
      lambda each: each['outer_balance']['median'],
      spread=lambda each: each['outer_balance']['quartiles'],
    ),
  ),
  (
    'expert_similarity',
    'Similarity of the experts',
    'Mean cosine of each pair of experts (RMoE, fig. 5); dashed is that of'
    ' random weights.',
    _by_depth(
      'mean cosine',
      lambda each: each['expert_similarity']['measured'],
      reference=lambda each: each['expert_similarity']['random'],
      reference_name='random',
    ),
  ),
  (
    'selection_frequency',
    'Selection of the experts',
    'How often each expert is chosen, relative to an even share.',
    _each(charts.selection_frequency),
  ),
  (
    'pairs',
    'Pairs of sub-experts',
    'Tokens of each pair of a Cartesian layer, relative to an even share'
    ' (CartesianMoE).',
    _each(
      charts.pair_map,
      lambda each: (
        each['pairs'].get('names')
        or [f'layer {x}' for x in dict.fromkeys(each['routers']['layers'])]
      ),
    ),
  ),
  (
    'token_classes',
    'Classes of tokens',
    'What an expert’s tokens are, relative to all tokens; 1 is no preference.',
    _each(
      charts.token_classes,
      lambda each: [f'router {name}' for name in each['routers']['names']],
    ),
  ),
  (
    'norms',
    'Norms of the weights',
    'A dot per expert: of its weights, and of its row in the gate.',
    _norms,
  ),
  (
    'checkpoints.route_stability',
    'Stability of the routes',
    'Share of the assignments that stay from one checkpoint to the next.',
    _over_checkpoints('route_stability', 'share unchanged'),
  ),
  (
    'checkpoints.gradient_norm',
    'Gradients of the routers',
    'Norms from the cross entropy and from the balance loss apart (RMoE,'
    ' table 11).',
    _gradients,
  ),
  (
    'checkpoints.drop_ratio',
    'Dropped assignments',
    'Share that would find no room at capacity factor 1.0 (RMoE, table 11).',
    _over_checkpoints('drop_ratio', 'share dropped'),
  ),
]


# What the page is told beside charts.


def _overview(
  variant: Variant, run: Workdir, compared: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
  """Returns a line of the table of runs.

  Args:
    variant: The variant of the run.
    run: The run.
    compared: The rows of comparisons, which know of runs what these do not.
  """
  of = [row for row in compared if row['variant'] == variant.name]
  row = of[0] if of else {}
  same = [each for each in row.get('runs', []) if each['seed'] == run.seed]
  steps = int(run.run.steps_P[-1])
  evaluations = [rows[-1] for rows in run.run.evaluations.values() if rows]
  bits = [
    float(last['bits_per_byte'])
    for last in [*same, *evaluations]
    if last.get('bits_per_byte') is not None
  ]
  return {
    'variant': variant.name,
    'name': run.run.name,
    'path': run.path,
    'seed': run.seed,
    'steps': steps,
    'planned': run.config.get('train.steps'),
    'tokens': steps * run.tokens_per_step if run.tokens_per_step else None,
    'parameters': run.recorded('parameters') or row.get('parameters'),
    'active': run.recorded('active_parameters') or row.get('active_parameters'),
    'flops': run.flops_per_token or row.get('flops_per_token'),
    'loss': float(runs.smooth(run.run.loss_P)[-1]),
    'bits': bits[0] if bits else None,
    'devices': run.recorded('devices') or '',
    'time': (run.recorded('time') or '')[:16].replace('T', ' '),
  }


def _commands(variants: Sequence[Variant]) -> list[tuple[str, str, str]]:
  """Returns each run's name, the command line that made it, and versions."""
  found = []
  for variant in variants:
    for run in variant.runs:
      command = run.recorded('command')
      if command:
        program, *flags = command
        text = ' '.join([program, *map(shlex.quote, flags)])
        seed = f', seed {run.seed}' if len(variant.runs) > 1 else ''
        versions = run.recorded('versions') or {}
        used = ', '.join(f'{name} {versions[name]}' for name in versions)
        found.append((variant.name + seed, text, used))
  return found


def _axes(variants: Sequence[Variant]) -> list[str]:
  """Returns what the curve of some run can be drawn over."""
  firsts = [variant.runs[0] for variant in variants]
  counted = [run for run in firsts if run.tokens_per_step]
  axes = ['steps', 'tokens'] if counted else ['steps']
  return (
    [*axes, 'flops'] if any(run.flops_per_token for run in counted) else axes
  )


def _measures(variants: Sequence[Variant]) -> list[tuple[str, str]]:
  """Returns what evaluations during training measured, and its words."""
  rows = [
    row
    for variant in variants
    for run in variant.runs
    for rows in run.run.evaluations.values()
    for row in rows
  ]
  return [
    (name, words)
    for name, words in (
      ('bits_per_byte', 'bits per byte'),
      ('loss', 'nats per token'),
    )
    if any(name in row for row in rows)
  ]


def _unrobust(variants: Sequence[Variant]) -> list[str]:
  """Returns the commands that measure the robustness that is not known."""
  return [
    f'moe_jax eval {shlex.quote(run.path)} --disable_top=0,1'
    for variant in variants
    for run in variant.runs
    if not any(row.get('disabled_top') for row in run.evaluations)
  ]


def _passages(variants: Sequence[Variant]) -> list[dict[str, Any]]:
  """Returns what the token explorer is told of each analysed variant."""
  found = []
  for variant in variants:
    run = variant.analysed
    analysis = run.analysis if run else None
    if not analysis or not analysis.get('passage'):
      continue
    passage, routers = analysis['passage'], analysis['routers']
    packed = {
      'name': variant.name,
      'tokens': passage['tokens'],
      'loss': [
        None if loss is None else round(loss, 2) for loss in passage['loss']
      ],
      'routers': routers['names'],
      'layers': routers['layers'],
      'experts': routers['experts'] + (routers.get('null_experts') or 0),
      'chosen': _columns(passage['experts']),
      'weights': _columns(passage['weights'], _LEVELS),
      'top': _columns(passage['top']),
      'probability': _columns(passage['top_probability'], _LEVELS),
      'levels': _LEVELS,
      'vocabulary': analysis.get('vocabulary'),
    }
    found.append(
      {
        'name': variant.name,
        'data': _packed(packed),
        'vocabulary': bool(packed['vocabulary']),
      }
    )
  return found


def _columns(values: Sequence[Any], scale: int = 0) -> list[list[list[int]]]:
  """[routers][T][K] as [routers][K][T], which compress best; -1 is nothing."""
  columns = []
  for router in values:
    width = max((len(row) for row in router), default=0)
    columns.append(
      [
        [
          (round(row[k] * scale) if scale else row[k]) if k < len(row) else -1
          for row in router
        ]
        for k in range(width)
      ]
    )
  return columns


def _compiled(chart: Chart) -> dict[str, Any]:
  """Returns a chart as Vega, which is less to do for a page than Vega-Lite."""
  chart_dict = chart.chart.to_dict(validate=False)
  chart_dict['config'] = {
    'aria': False,  # the page says in words what a chart shows
    'background': 'transparent',
    'view': {'stroke': None},
    'font': 'system-ui, sans-serif',
    'axis': {'labelFontSize': 11, 'titleFontSize': 11, 'titleFontWeight': 400},
    'legend': {'titleFontSize': 11, 'titleFontWeight': 400},
  }
  version = '.'.join(altair.SCHEMA_VERSION.removeprefix('v').split('.')[:2])
  vega = vl_convert.vegalite_to_vega(chart_dict, vl_version=version)
  return {'vega': vega, 'renderer': 'canvas' if chart.canvas else 'svg'}


@functools.cache
def _bundle() -> str:
  """Returns the JavaScript that draws charts: Vega, from vl-convert."""
  bundle = vl_convert.javascript_bundle('window.vegaEmbed = vegaEmbed;')
  return bundle.replace('</script', '<\\/script')


def _mean(values: Sequence[float | None]) -> float | None:
  """Returns the mean of what is known; None where nothing is."""
  known = [value for value in values if value is not None]
  return sum(known) / len(known) if known else None


def _packed(value: Any) -> str:
  """Returns compressed JSON, as text that means nothing in HTML."""
  text = strict_json.dumps(value, separators=(',', ':'))
  return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _number(value: Any, digits: int = 4) -> str:
  """Returns a number as a table has it; a dash for None."""
  if value is None:
    return '–'
  if isinstance(value, str | bool):
    return str(value)
  if isinstance(value, int) or abs(value) >= 10**digits:
    return f'{value:,.0f}'
  return f'{float(value):.{digits}g}'


def _read_comparison(path: str, name: str, prefix: str) -> dict[str, Any]:
  """Returns a compare.json, with its name, and `prefix` before variants."""
  try:
    comparison = strict_json.decoded(read_json(path))
    if comparison['format'] != runs.COMPARISON_FORMAT:
      raise ValueError(
        f'format {comparison["format"]}, not {runs.COMPARISON_FORMAT}'
      )
    return {
      **comparison,
      'name': name,
      'baseline': prefix + comparison['baseline'],
      'rows': [
        {**row, 'variant': prefix + row['variant']}
        for row in comparison['rows']
      ],
    }
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{path} is not of a comparison that this version knows ({error}); run'
      ' moe_jax compare again'
    ) from error


def _save(text: str, output: str) -> None:
  try:
    with open(output, 'w', encoding='utf-8', errors='xmlcharrefreplace') as f:
      f.write(text)
  except OSError as error:
    raise disk.refused(output, error, kind='--output:') from error


if __name__ == '__main__':
  exits.exit_with(lambda: sys.exit(main()))
