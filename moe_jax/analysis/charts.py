"""The charts of a report, in Altair: of runs' metrics and of their analyses.

A chart has no width and no colours of text: the page that draws it sets both,
and signals of it besides. `axis` is what the curves run over, `measure` what
is drawn of evaluations, `choice` which router or layer a map is of, counted
from 0.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from moe_jax.analysis.runs import Variant, Workdir, over_seeds, smooth

# Okabe and Ito's colours, told apart by all common kinds of colour vision.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_GREY = '#888888'
_MOST_POINTS = 300  # of a curve
_MOST_CELLS = 8000  # of a map over time
_MEASURES = ('bits_per_byte', 'loss')


@dataclasses.dataclass(frozen=True)
class Chart:
  """A chart of a report.

  Attributes:
    about: What it shows, in words that do for it.
    chart: The chart.
    title: What tells it from the others of its panel.
    note: What of `about` is worth reading beside it.
    canvas: Whether it has so many marks that it is drawn as pixels.
  """

  about: str
  chart: alt.TopLevelMixin
  title: str = ''
  note: str = ''
  canvas: bool = False


class Palette:
  """The colours of variants, in all charts the same.

  Attributes:
    colours: The colour of each name.
    later: The names that have the colour of an earlier one; their lines are
      broken.
  """

  def __init__(self, names: Sequence[str]):
    self.colours = {
      name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)
    }
    self.later = list(names)[len(COLOURS) :]

  def __call__(self, names: Sequence[str]) -> alt.Color:
    """Returns the encoding of these variants; the page has the legend."""
    colours = [self.colours[name] for name in names]
    scale = alt.Scale(domain=list(names), range=colours)
    return alt.Color('variant:N', scale=scale, legend=None)

  def dashes(self, names: Sequence[str]) -> dict[str, alt.StrokeDash]:
    """Returns the encoding of lines, if any of these is to be broken."""
    broken = [[7, 3] if name in self.later else [1, 0] for name in names]
    scale = alt.Scale(domain=list(names), range=broken)
    dash = alt.StrokeDash('variant:N', scale=scale, legend=None)
    return {'strokeDash': dash} if [7, 3] in broken else {}


# Curves.


def training_curve(variants: Sequence[Variant], palette: Palette) -> Chart:
  """Returns the smoothed loss of training, of several seeds their mean."""
  rows, raw, said = [], [], []
  for variant in variants:
    steps_P, mean_P, deviation_P = mean_loss(variant)
    rows += _band(variant, steps_P, mean_P, deviation_P)
    said.append(f'{variant.name} {mean_P[-1]:.3f} at step {steps_P[-1]:,.0f}')
    if len(variant.runs) == 1:
      run = variant.runs[0].run
      zeros_P = np.zeros(len(run.steps_P))
      raw += _band(variant, run.steps_P, run.loss_P, zeros_P)
  names = [variant.name for variant in variants]
  colour = palette(names)
  chart = _curve(rows, palette, names, 'nats per token', points=False)
  if raw:
    faint = _over_axis(raw).mark_line(opacity=0.25, strokeWidth=1)
    y = alt.Y('y:Q', title='nats per token')
    chart = faint.encode(y=y, x=_X_AXIS, color=colour) + chart
  about = f'Training loss, smoothed; {"; ".join(said)}.'
  return Chart(about, _sized(chart.add_params(_axis_param()), 280))


def mean_loss(
  variant: Variant,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns steps, mean and deviation over seeds of the smoothed loss [P]."""
  return over_seeds(
    [(run.run.steps_P, smooth(run.run.loss_P)) for run in variant.runs]
  )


def evaluation_curve(
  variants: Sequence[Variant], palette: Palette, split: str
) -> Chart | None:
  """Returns the evaluations of a split during training, None without any."""
  rows, said, names = [], [], []
  for variant in variants:
    for measure in _MEASURES:
      curves = [_evaluations(run, split, measure) for run in variant.runs]
      curves = [curve for curve in curves if len(curve[0])]
      if not curves:
        continue
      steps_P, mean_P, deviation_P = over_seeds(curves)
      if not len(steps_P):
        continue
      of = _band(variant, steps_P, mean_P, deviation_P)
      rows += [row | {'measure': measure} for row in of]
      if variant.name not in names:
        said.append(f'{variant.name} {mean_P[-1]:.3f} {_words(measure)}')
        names.append(variant.name)
  if not rows:
    return None
  measures = [m for m in _MEASURES if any(r['measure'] == m for r in rows)]
  chart = _curve(
    rows,
    palette,
    names,
    None,
    points=True,
    keep='datum.measure == measure',
  ).add_params(_axis_param(), alt.param(name='measure', value=measures[0]))
  about = f'{split} over training; last: {"; ".join(said)}.'
  return Chart(about, _sized(chart, 280))


def _evaluations(
  run: Workdir, split: str, measure: str
) -> tuple[np.ndarray, np.ndarray]:
  rows = run.run.evaluations.get(split, [])
  found = [(row['step'], float(row[measure])) for row in rows if measure in row]
  points_P2 = np.array(found, float).reshape(-1, 2)
  return points_P2[:, 0], points_P2[:, 1]


def _band(
  variant: Variant,
  steps_P: np.ndarray,
  mean_P: np.ndarray,
  deviation_P: np.ndarray,
) -> list[dict[str, Any]]:
  """Returns the points of a curve, thinned, with all axes to draw them over."""
  first = variant.runs[0]
  tokens, flops = first.tokens_per_step, first.flops_per_token
  kept = np.unique(
    np.linspace(0, len(steps_P) - 1, _MOST_POINTS).round().astype(int)
  )
  rows = []
  for i in kept:
    step = int(steps_P[i])
    row: dict[str, Any] = {
      'variant': variant.name,
      'steps': step,
      'y': _round(mean_P[i], 4),
    }
    if tokens:
      row['tokens'] = step * tokens
    if tokens and flops:
      row['flops'] = _round(step * tokens * flops, 4)
    if deviation_P.any():
      row['low'] = _round(mean_P[i] - deviation_P[i], 4)
      row['high'] = _round(mean_P[i] + deviation_P[i], 4)
    rows.append(row)
  return rows


_X_AXIS = alt.X(
  'x:Q',
  title=None,
  axis=alt.Axis(
    labelExpr="format(datum.value, axis == 'steps' ? ',' : '~s')", tickCount=5
  ),
)


def _axis_param() -> alt.Parameter:
  return alt.param(name='axis', value='steps')


def _over_axis(rows: list[dict[str, Any]], keep: str = 'true') -> alt.Chart:
  return (
    alt.Chart(alt.Data(values=rows))
    .transform_filter(keep)
    .transform_calculate(x='datum[axis]')
    .transform_filter('isValid(datum.x)')
  )


def _curve(
  rows: list[dict[str, Any]],
  palette: Palette,
  names: Sequence[str],
  title: str | None,
  points: bool,
  keep: str = 'true',
) -> Any:
  base, colour = _over_axis(rows, keep), palette(names)
  y = alt.Y('y:Q', title=title, scale=alt.Scale(zero=False))
  mark = {'size': 28} if points else False
  line = base.mark_line(point=mark, strokeWidth=2).encode(
    x=_X_AXIS,
    y=y,
    color=colour,
    tooltip=[
      alt.Tooltip('variant:N'),
      alt.Tooltip('steps:Q', title='step', format=','),
      alt.Tooltip('y:Q', title='value', format='.4f'),
    ],
    **palette.dashes(names),
  )
  if not any('low' in row for row in rows):
    return alt.layer(line)
  low = alt.Y('low:Q', title=title)
  band = base.transform_filter('isValid(datum.low)').mark_area(opacity=0.2)
  return band.encode(x=_X_AXIS, y=low, y2='high:Q', color=colour) + line


# Comparisons.


def comparison_dots(
  comparison: Mapping[str, Any], palette: Palette
) -> Chart | None:
  """Returns the means, their deviations, and every seed; None without any."""
  metric = _metric(comparison)
  rows = [row for row in comparison['rows'] if row['mean'] is not None]
  if not rows:
    return None
  names = [row['variant'] for row in rows]
  means = [
    {
      'variant': row['variant'],
      'mean': row['mean'],
      'low': row['mean'] - (row['deviation'] or 0),
      'high': row['mean'] + (row['deviation'] or 0),
    }
    for row in rows
  ]
  runs = [
    {
      'variant': row['variant'],
      'seed': run['seed'],
      'value': run[_metric(comparison)],
    }
    for row in rows
    for run in row['runs']
  ]
  colour = palette(names)
  y = alt.Y('variant:N', sort=names, title=None, axis=alt.Axis(labelLimit=170))
  title = _words(metric)
  scale = alt.Scale(zero=False, padding=12)
  base = alt.Chart(alt.Data(values=means)).encode(y=y, color=colour)
  whisker = base.mark_rule(strokeWidth=2).encode(
    x=alt.X('low:Q', title=title, scale=scale, axis=_FEW), x2='high:Q'
  )
  dot = base.mark_point(filled=True, size=90, opacity=1).encode(
    x='mean:Q',
    tooltip=[alt.Tooltip('variant:N'), alt.Tooltip('mean:Q', format='.4f')],
  )
  each = (
    alt.Chart(alt.Data(values=runs))
    .mark_tick(thickness=1.5, size=14, opacity=0.7)
    .encode(
      y=y,
      x='value:Q',
      color=colour,
      tooltip=[
        alt.Tooltip('variant:N'),
        alt.Tooltip('seed:N'),
        alt.Tooltip('value:Q', title=title, format='.4f'),
      ],
    )
  )
  said = [f'{row["variant"]} {row["mean"]:.4f}' for row in rows]
  about = f'Mean {title} with its deviation: {"; ".join(said)}.'
  height = 34 * len(rows) + 10
  chart = whisker + each + dot
  return Chart(about, _sized(chart, height), f'{title}: mean, deviation, seeds')


def comparison_differences(
  comparison: Mapping[str, Any], palette: Palette
) -> Chart | None:
  """Returns the paired differences to the baseline; None where none is."""
  rows = [
    {
      'variant': row['variant'],
      'difference': row['difference'],
      'low': row['interval'][0],
      'high': row['interval'][1],
    }
    for row in comparison['rows']
    if row.get('difference') is not None and row.get('interval')
  ]
  if not rows:
    return None
  names = [row['variant'] for row in rows]
  baseline = comparison['baseline']
  base = alt.Chart(alt.Data(values=rows)).encode(
    y=alt.Y('variant:N', sort=names, title=None, axis=alt.Axis(labelLimit=170)),
    color=palette(names),
  )
  title = f'difference to {baseline}, {_words(_metric(comparison))}'
  scale = alt.Scale(padding=12)
  whisker = base.mark_rule(strokeWidth=2).encode(
    x=alt.X('low:Q', title=title, scale=scale, axis=_FEW), x2='high:Q'
  )
  dot = base.mark_point(filled=True, size=90, opacity=1).encode(
    x='difference:Q',
    tooltip=[
      alt.Tooltip('variant:N'),
      alt.Tooltip('difference:Q', format='+.4f'),
      alt.Tooltip('low:Q', format='+.4f'),
      alt.Tooltip('high:Q', format='+.4f'),
    ],
  )
  zero = _rule('x', 0)
  said = [
    f'{row["variant"]} {row["difference"]:+.4f}'
    f' [{row["low"]:+.4f}, {row["high"]:+.4f}]'
    for row in rows
  ]
  about = f'Paired difference to {baseline}, 95 % interval: {"; ".join(said)}.'
  height = 34 * len(rows) + 10
  chart = zero + whisker + dot
  return Chart(about, _sized(chart, height), 'paired difference, 95 % interval')


def sweep(comparison: Mapping[str, Any], palette: Palette) -> Chart | None:
  """Returns what each variant came to over the values tried; None if none."""
  rows = [
    {'variant': row['variant'], 'value': value, 'y': result}
    for row in comparison['rows']
    for value, result in ((row.get('swept') or {}).get('results') or {}).items()
    if result is not None
  ]
  if not rows:
    return None
  names = list(dict.fromkeys(row['variant'] for row in rows))
  # Text, in the order that it was asked for: a grid has several in one.
  values = list(dict.fromkeys(row['value'] for row in rows))
  key = comparison['sweep']['key']
  y_title = _words(_metric(comparison))
  chart = (
    alt.Chart(alt.Data(values=rows))
    .mark_line(point={'size': 40})
    .encode(
      x=alt.X('value:O', title=key, sort=values, axis=_UPRIGHT),
      y=alt.Y('y:Q', title=y_title, scale=alt.Scale(zero=False)),
      color=palette(names),
      tooltip=[
        alt.Tooltip('variant:N'),
        alt.Tooltip('value:O', title=key),
        alt.Tooltip('y:Q', title=y_title, format='.4f'),
      ],
    )
  )
  about = f'{y_title} over {key} for {", ".join(names)}.'
  return Chart(about, _sized(chart, 200), f'search over {key}')


# Metrics of the experts.


def load_map(run: Workdir) -> Chart:
  """Returns the share of every expert over time, relative to an even one."""
  steps_P, load_PRN = loads(run)
  count_P, count_R, count_N = load_PRN.shape
  names = router_names(run)
  width = steps_P[1] - steps_P[0] if len(steps_P) > 1 else 1
  edges_P = np.concatenate([[max(steps_P[0] - width, 0)], steps_P])
  values = load_PRN.transpose(1, 2, 0)
  row = f'floor((datum.i - 1) / {count_P})'
  height = float(np.clip(13 * count_R * (count_N + 1), 130, 560))
  chart = (
    _flat(values)
    .transform_calculate(
      column=f'(datum.i - 1) % {count_P}',
      router=f'floor({row} / {count_N})',
      expert=f'{row} % {count_N}',
    )
    .transform_calculate(
      low=f'{json.dumps(edges_P.tolist())}[datum.column]',
      high=f'{json.dumps(edges_P.tolist())}[datum.column + 1]',
      top=f'datum.router * {count_N + 1} + datum.expert',
      bottom=f'datum.router * {count_N + 1} + datum.expert + 1',
      name=f'{json.dumps(names)}[datum.router]',
    )
    .mark_rect()
    .encode(
      x=alt.X(
        'low:Q',
        title='step',
        scale=alt.Scale(zero=False, nice=False, round=True),
        axis=alt.Axis(format=',', grid=False, tickCount=5),
      ),
      x2='high:Q',
      y=alt.Y(
        'top:Q',
        title='router, and its experts',
        scale=alt.Scale(
          domain=[0, count_R * (count_N + 1) - 1],
          reverse=True,
          nice=False,
          round=True,
        ),
        axis=alt.Axis(
          values=[r * (count_N + 1) + count_N / 2 for r in range(count_R)],
          labelExpr=f'{json.dumps(names)}[floor(datum.value / {count_N + 1})]',
          grid=False,
          ticks=False,
        ),
      ),
      y2='bottom:Q',
      color=_shade([0, 2], 'share / even share', '.1f'),
      tooltip=[
        alt.Tooltip('name:N', title='router'),
        alt.Tooltip('expert:Q'),
        alt.Tooltip('high:Q', title='up to step', format=','),
        alt.Tooltip('value:Q', title='share / even share', format='.2f'),
      ],
    )
  )
  last_RN = load_PRN[-1]
  about = (
    f'Load of {count_N} experts of {count_R} routers over training. At the end'
    f' the busiest has {last_RN.max():.2f} times the even share, the idlest'
    f' {last_RN.min():.2f} times.'
  )
  return Chart(about, _sized(chart, height), canvas=True)


def loads(run: Workdir) -> tuple[np.ndarray, np.ndarray]:
  """Returns the load of experts, averaged over windows of logged steps.

  Returns:
    The last step of each window [P], and the share of the assignments that
    each expert got, relative to an even share: [P, routers, N].
  """
  counts_PWSN = run.run.counts_PWSN
  points, layers, factors, experts = counts_PWSN.shape
  counts_PRN = counts_PWSN.reshape(points, layers * factors, experts)
  most = int(np.clip(_MOST_CELLS // (layers * factors * experts), 12, 60))
  windows = np.array_split(np.arange(points), min(points, most))
  sums_PRN = np.stack([counts_PRN[window].sum(0) for window in windows])
  even = np.maximum(sums_PRN.sum(-1, keepdims=True), 1) / experts
  return run.run.steps_P[[window[-1] for window in windows]], sums_PRN / even


def entropy_curve(run: Workdir) -> Chart:
  """Returns the entropy of the routers over training, a line per layer."""
  entropy_PW = run.run.entropy_PW
  kept = np.unique(np.linspace(0, len(entropy_PW) - 1, 100).round().astype(int))
  names = [str(layer) for layer in _moe_layers(run)]
  smoothed_WP = np.array([smooth(column) for column in entropy_PW.T])
  chart = _lines_by_depth(
    run.run.steps_P[kept], smoothed_WP[:, kept], names, 'step', 'nats per token'
  )
  about = (
    'Mean entropy of the routers per layer; at the end'
    f' {_listed(names, smoothed_WP[:, -1])}.'
  )
  return Chart(about, chart)


def router_names(run: Workdir) -> list[str]:
  """Returns a label for every router in depth order: '3', or '3A' and '3B'."""
  if run.analysis and run.analysis.get('routers'):
    return list(run.analysis['routers']['names'])
  factors = run.run.counts_PWSN.shape[2]
  return [
    f'{layer}{chr(65 + s) if factors > 1 else ""}'
    for layer in _moe_layers(run)
    for s in range(factors)
  ]


def _moe_layers(run: Workdir) -> list[int]:
  """Returns the numbers of the MoE layers; 1, 2, ... where none are known."""
  count = run.run.max_load_PW.shape[1]
  if run.analysis and run.analysis.get('routers'):
    layers = sorted(set(run.analysis['routers']['layers']))
    if len(layers) == count:
      return layers
  return list(range(1, count + 1))


# Analyses. Each function gets one analysis, or all of them by variant.


def over_depth(
  analyses: Mapping[str, Mapping[str, Any]],
  palette: Palette,
  y_title: str,
  values: Callable[[Mapping[str, Any]], Sequence[float | None]],
  spread: Callable[[Mapping[str, Any]], Sequence[Any]] | None = None,
  reference: Callable[[Mapping[str, Any]], Sequence[float]] | None = None,
  reference_name: str = '',
) -> Chart:
  """Returns a number of each router over the depth, a line per variant.

  Args:
    analyses: Analyses by the names of their variants.
    palette: The colours of the variants.
    y_title: What the number is.
    values: Returns the numbers of an analysis.
    spread: Returns a low and a high one for each.
    reference: Returns what to compare each with, drawn dashed.
    reference_name: What that is.
  """
  rows, said = [], []
  for name, analysis in analyses.items():
    routers = analysis['routers']
    numbers = values(analysis)
    for i, number in enumerate(numbers):
      factors = max(routers.get('factors') or 1, 1)
      row = {
        'variant': name,
        'router': routers['names'][i],
        'depth': routers['layers'][i] + i % factors / factors,
        'y': _round(number),
      }
      if spread:
        low, high = spread(analysis)[i]
        row |= {'low': _round(low), 'high': _round(high)}
      if reference:
        row['reference'] = _round(reference(analysis)[i])
      rows.append(row)
    said.append(f'{name}: {_listed(routers["names"], numbers)}')
  base = alt.Chart(alt.Data(values=rows)).encode(
    x=alt.X(
      'depth:Q',
      title='layer',
      scale=alt.Scale(zero=False, nice=False, padding=10),
      axis=alt.Axis(tickMinStep=1, format='d', tickCount=8),
    ),
    color=palette(list(analyses)),
  )
  tooltip = [
    alt.Tooltip('variant:N'),
    alt.Tooltip('router:N'),
    alt.Tooltip('y:Q', title=y_title, format='.3f'),
  ]
  parts = []
  if spread:
    bars = base.mark_rule(opacity=0.45, strokeWidth=2)
    parts.append(bars.encode(y=alt.Y('low:Q', title=y_title), y2='high:Q'))
    tooltip += [
      alt.Tooltip('low:Q', title='lower quartile', format='.3f'),
      alt.Tooltip('high:Q', title='upper quartile', format='.3f'),
    ]
  if reference:
    dashed = base.mark_line(strokeDash=[2, 2], opacity=0.8)
    parts.append(dashed.encode(y=alt.Y('reference:Q', title=y_title)))
    tooltip.append(
      alt.Tooltip('reference:Q', title=reference_name, format='.3f')
    )
  line = base.mark_line(point={'size': 40}, strokeWidth=2)
  parts.append(
    line.encode(
      y=alt.Y('y:Q', title=y_title, scale=alt.Scale(zero=False)),
      tooltip=tooltip,
      **palette.dashes(list(analyses)),
    )
  )
  return Chart(
    f'{y_title} by router. {"; ".join(said)}.',
    _sized(alt.layer(*parts), 220),
  )


def mutual_information(analysis: Mapping[str, Any], most: float) -> Chart:
  """Returns the mutual information of each pair of routers (RMoE, fig. 3)."""
  names = analysis['routers']['names']
  values = np.array(analysis['mutual_information'], float)
  apart = ~np.eye(len(names), dtype=bool)
  mean = values[apart].mean() if apart.any() else 0.0
  note = f'mean between two routers: {mean:.3f} nats'
  about = f'Mutual information of the scores of each pair of routers; {note}.'
  chart = _heat(
    values, 'router', names, 'router', names, [0, most], 'nats', '.3f', 260
  )
  return Chart(about, chart, note=note, canvas=True)


def most_mutual_information(analyses: Sequence[Mapping[str, Any]]) -> float:
  """Returns the most that two different routers share in any analysis."""
  most = 0.0
  for analysis in analyses:
    values = np.array(analysis['mutual_information'], float)
    np.fill_diagonal(values, 0)
    most = max(most, float(values.max(initial=0)))
  return most or 1.0


def gate_entropy(analysis: Mapping[str, Any]) -> Chart:
  """Returns the densities of the gates' entropy per token (RMoE, fig. 4)."""
  names = analysis['routers']['names']
  found = analysis['gate_entropy']
  edges = np.array(found['edges'])
  chart = _lines_by_depth(
    (edges[1:] + edges[:-1]) / 2,
    np.array(found['density'], float),
    names,
    'nats per token',
    'density',
    zero=True,
  )
  about = (
    'Density over tokens of the entropy of the gate, per router; means in'
    f' nats: {_listed(names, found["mean"])}.'
  )
  return Chart(about, chart)


def selection_frequency(analysis: Mapping[str, Any]) -> Chart:
  """Returns how often each expert is chosen, relative to an even share."""
  names = analysis['routers']['names']
  shares_RN = np.array(analysis['selection_frequency'], float)
  even = np.maximum(shares_RN.mean(1, keepdims=True), 1e-9)
  experts = [str(n) for n in range(shares_RN.shape[1])]
  ratios = shares_RN / even
  chart = _heat(
    ratios,
    'expert',
    experts,
    'router',
    names,
    [0, 2],
    'share / even share',
    '.2f',
    _rows_height(names),
  )
  about = (
    'How often each expert is chosen, relative to an even share: from'
    f' {ratios.min():.2f} to {ratios.max():.2f}.'
  )
  return Chart(about, chart, canvas=True)


def norms(analysis: Mapping[str, Any], of: str, colour: str) -> Chart:
  """Returns the norms of the weights `of` router or experts, one per expert."""
  names = analysis['routers']['names']
  values = analysis['norms'][of]
  rows = [
    {'router': names[r], 'expert': n, 'norm': _round(norm)}
    for r, row in enumerate(values)
    for n, norm in enumerate(row or [])
  ]
  chart = (
    alt.Chart(alt.Data(values=rows))
    .mark_point(filled=True, size=30, opacity=0.6, color=colour)
    .encode(
      x=alt.X('router:N', sort=names, title='router', axis=_UPRIGHT),
      y=alt.Y('norm:Q', title='norm', scale=alt.Scale(zero=False)),
      tooltip=['router:N', 'expert:Q', alt.Tooltip('norm:Q', format='.3f')],
    )
  )
  numbers = [row['norm'] for row in rows]
  about = (
    f'Norms of the weights of the {of}, a dot per expert: from'
    f' {min(numbers):.3g} to {max(numbers):.3g}.'
  )
  return Chart(about, _sized(chart, 180))


def pair_map(analysis: Mapping[str, Any]) -> Chart:
  """Returns the share of each pair of sub-experts, a map per layer."""
  pairs = analysis['pairs']
  shares = np.array(pairs['shares'], float)
  experts = [str(n) for n in range(shares.shape[-1])]
  ratios = shares * shares.shape[-1] * shares.shape[-2]
  live = ', '.join(f'{100 * share:.0f} %' for share in pairs['live'])
  note = f'live pairs by layer, above a tenth of an even share: {live}'
  chart = _heat(
    ratios,
    'expert of B',
    experts,
    'expert of A',
    experts,
    [0, 4],
    'share / even share',
    '.2f',
    260,
  )
  about = (
    'Share of the tokens of each pair of experts of the sub-layers A and B;'
    f' {note}.'
  )
  return Chart(about, chart, note=note, canvas=True)


def token_classes(analysis: Mapping[str, Any]) -> Chart:
  """Returns the classes of the tokens of each expert, a map per router."""
  found = analysis['token_classes']
  base = np.maximum(np.array(found['base'], float), 1e-9)
  lifts = np.array(found['share'], float) / base
  experts = [str(n) for n in range(lifts.shape[1])]
  chart = _heat(
    lifts,
    'class of the token',
    found['classes'],
    'expert',
    experts,
    [0, 3],
    "share / class's share",
    '.2f',
    _rows_height(experts),
  )
  about = (
    'Share of each class of tokens among those of an expert, relative to its'
    f' share of all tokens; classes: {", ".join(found["classes"])}.'
  )
  return Chart(about, chart, canvas=True)


def over_checkpoints(
  analysis: Mapping[str, Any],
  values: Sequence[Sequence[float]],
  y_title: str,
) -> Chart:
  """Returns a number of each router over checkpoints, a line per router.

  Args:
    analysis: The analysis.
    values: [P][routers], or one fewer: of the changes from one to the next.
    y_title: What the number is.
  """
  names = analysis['routers']['names']
  steps = analysis['checkpoints']['steps'][-len(values) :]
  values_RP = np.array(values, float).T
  chart = _lines_by_depth(
    np.array(steps), values_RP, names, 'step', y_title, points=True
  )
  last = _listed(names, values_RP[:, -1])
  return Chart(f'{y_title} over checkpoints; at the last: {last}.', chart)


def _lines_by_depth(
  x_P: np.ndarray,
  values_RP: np.ndarray,
  names: Sequence[str],
  x_title: str,
  y_title: str,
  zero: bool = False,
  points: bool = False,
) -> alt.TopLevelMixin:
  """Returns a line per router, in colours that run with the depth."""
  count = len(x_P)
  xs = json.dumps([_round(x) for x in x_P])
  chart = (
    _flat(values_RP, digits=5)
    .transform_calculate(
      x=f'{xs}[(datum.i - 1) % {count}]',
      router=f'{json.dumps(names)}[floor((datum.i - 1) / {count})]',
    )
    .mark_line(strokeWidth=1.8, point={'size': 24} if points else False)
    .encode(
      x=alt.X(
        'x:Q',
        title=x_title,
        scale=alt.Scale(zero=False, nice=False),
        axis=alt.Axis(format=',', tickCount=5),
      ),
      y=alt.Y('value:Q', title=y_title, scale=alt.Scale(zero=zero)),
      color=alt.Color(
        'router:O',
        sort=list(names),
        scale=alt.Scale(domain=list(names)),
        legend=alt.Legend(
          orient='bottom',
          title=None,
          symbolType='stroke',
          symbolSize=60,
          columns=6 if max(map(len, names)) < 3 else 4,
          columnPadding=5,
          labelOffset=2,
          symbolLimit=24,
        ),
      ),
      tooltip=[
        'router:N',
        alt.Tooltip('x:Q', title=x_title),
        alt.Tooltip('value:Q', title=y_title, format='.3f'),
      ],
    )
  )
  return _sized(chart, 200)


def _heat(
  values: np.ndarray,
  x_title: str,
  x_names: Sequence[str],
  y_title: str,
  y_names: Sequence[str],
  domain: Sequence[float],
  value_title: str,
  number_format: str,
  height: float,
) -> alt.TopLevelMixin:
  """Returns a map [rows, columns], or several of which `choice` is drawn."""
  columns, size = len(x_names), len(x_names) * len(y_names)
  chart = (
    _flat(values)
    .transform_calculate(
      x=f'{json.dumps(x_names)}[(datum.i - 1) % {columns}]',
      y=f'{json.dumps(y_names)}[floor((datum.i - 1) % {size} / {columns})]',
      at=f'floor((datum.i - 1) / {size})',
    )
    .transform_filter(f'datum.at == min(choice, {values.size // size - 1})')
    .mark_rect()
    .encode(
      x=alt.X(
        'x:N',
        sort=list(x_names),
        title=x_title,
        axis=alt.Axis(
          labelAngle=-40 if max(map(len, x_names)) > 3 else 0,
          labelOverlap=len(x_names) > 12,
          labelSeparation=3,
          grid=False,
          ticks=False,
        ),
      ),
      y=alt.Y(
        'y:N',
        sort=list(y_names),
        title=y_title,
        axis=alt.Axis(labelOverlap=True, grid=False, ticks=False),
      ),
      color=_shade(domain, value_title, '~r'),
      tooltip=[
        alt.Tooltip('y:N', title=y_title),
        alt.Tooltip('x:N', title=x_title),
        alt.Tooltip('value:Q', title=value_title, format=number_format),
      ],
    )
    .add_params(alt.param(name='choice', value=0))
  )
  return _sized(chart, height)


_FEW = alt.Axis(tickCount=5)
_UPRIGHT = alt.Axis(labelAngle=0, labelOverlap=True)


def _flat(values: np.ndarray, digits: int = 3) -> alt.Chart:
  """Returns a chart of an array's numbers: `value`, and `i` from 1 on."""
  flat = [_round(value, digits) for value in values.ravel()]
  return (
    alt.Chart(alt.Data(values=flat))
    .transform_calculate(value='datum.data')
    .transform_window(i='row_number()')
  )


def _shade(
  domain: Sequence[float], title: str, number_format: str
) -> alt.Color:
  return alt.Color(
    'value:Q',
    scale=alt.Scale(domain=list(domain), clamp=True),
    legend=alt.Legend(
      orient='top',
      title=title,
      format=number_format,
      gradientLength=120,
      gradientThickness=8,
      tickCount=3,
    ),
  )


def _rule(channel: str, value: float) -> alt.Chart:
  encoding = alt.X if channel == 'x' else alt.Y
  return (
    alt.Chart(alt.Data(values=[{'at': value}]))
    .mark_rule(color=_GREY, strokeDash=[3, 3])
    .encode(**{channel: encoding('at:Q')})
  )


def _sized(chart: Any, height: float) -> alt.TopLevelMixin:
  return chart.properties(width='container', height=height)


def _rows_height(rows: Sequence[str]) -> float:
  return float(np.clip(17 * len(rows), 80, 420))


def _metric(comparison: Mapping[str, Any]) -> str:
  return comparison.get('metric') or 'bits_per_byte'


def _words(name: str) -> str:
  return name.replace('_', ' ')


def _listed(names: Sequence[str], numbers: Iterable[float | None]) -> str:
  """Returns `1A 0.21, 1B 0.34, ...`, the first twelve."""
  pairs = [
    f'{name} {number:.3g}'
    for name, number in zip(names, numbers, strict=True)
    if number is not None
  ]
  return ', '.join(pairs[:12]) + (', ...' if len(pairs) > 12 else '')


def _round(value: float | None, digits: int = 3) -> float | None:
  """Returns a number to so many digits beyond the first; None if not finite."""
  if value is None or not np.isfinite(value):
    return None
  return float(f'{float(value):.{digits + 1}g}')
