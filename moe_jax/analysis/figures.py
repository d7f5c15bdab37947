"""The pictures of an analysis, from what its JSON file holds."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.analysis.plots import COLOURS, GREY, number_steps, style

_MOST_NAMED = 24  # routers or experts along an axis
_MOST_LINES = 6  # in a legend
_WIDE = 10  # times the lowest value, from which on a scale is logarithmic

Analysis = dict[str, Any]


def save(analysis: Analysis, folder: str) -> list[str]:
  """Draws every analysis that there is, as FOLDER/STEP-NAME.png.

  Args:
    analysis: The content of an analysis file.
    folder: The directory, which exists.

  Returns:
    The paths of the pictures.
  """
  paths = []
  for name, draw in FIGURES.items():
    if analysis[name] is None:
      continue
    path = os.path.join(folder, f'{analysis["step"]}-{name}.png')
    with style():
      figure = draw(analysis)
      figure.savefig(path, dpi=150)
    paths.append(path)
  return paths


def mutual_information(analysis: Analysis) -> Figure:
  """Draws the mutual information of any two routers (RMoE figure 3)."""
  figure, [[axes]] = _figure(1, 1, 5, 4)
  values = _array(analysis['mutual_information'])
  names = analysis['routers']['names']
  _heat(axes, values, names, names, 'nats')
  axes.set(xlabel='router', ylabel='router')
  axes.set_title(f'Mutual information ({analysis["run"]})', loc='left')
  return figure


def gate_entropy(analysis: Analysis) -> Figure:
  """Draws the distribution of the gates' entropy (RMoE figure 4)."""
  figure, [[axes]] = _figure(1, 1, 6, 3.6)
  entropy = analysis['gate_entropy']
  edges = _array(entropy['edges'])
  middle = (edges[1:] + edges[:-1]) / 2
  names = analysis['routers']['names']
  _lines_by_depth(axes, names, [middle] * len(names), entropy['density'])
  axes.set(
    xlabel='entropy of the gate, nats per token',
    ylabel='density of tokens',
    xlim=(0, edges[-1]),
  )
  axes.set_ylim(bottom=0)
  axes.set_title(f'Gate entropy ({analysis["run"]})', loc='left')
  return figure


def inner_balance(analysis: Analysis) -> Figure:
  """Draws inner and outer balance (RMoE table 8)."""
  figure, [[inner, outer]] = _figure(1, 2, 9, 3.4)
  names = analysis['routers']['names']
  for axes, key, title in (
    (inner, 'inner_balance', 'first probability / second'),
    (outer, 'outer_balance', 'sum of the chosen probabilities'),
  ):
    _with_quartiles(axes, names, analysis[key])
    axes.set(xlabel='router', ylabel=title)
  # Routers differ by orders of magnitude, or hardly at all.
  lowest, highest = inner.get_ylim()
  if lowest > 0 and highest > _WIDE * lowest:
    inner.set_yscale('log')
  outer.set_ylim(0, 1.02)
  inner.set_title(f'Inner balance ({analysis["run"]})', loc='left')
  outer.set_title('Outer balance', loc='left')
  return figure


def selection_frequency(analysis: Analysis) -> Figure:
  """Draws the share of tokens that choose each expert."""
  figure, [[axes]] = _figure(1, 1, 6, 3.6)
  values = _array(analysis['selection_frequency'])
  experts = list(map(str, range(values.shape[1])))
  _heat(axes, values, analysis['routers']['names'], experts, 'share of tokens')
  axes.set(xlabel='expert', ylabel='router')
  axes.set_title(f'Selection frequency ({analysis["run"]})', loc='left')
  return figure


def expert_similarity(analysis: Analysis) -> Figure:
  """Draws how alike experts are, beside fresh ones (RMoE figure 5)."""
  figure, [[axes]] = _figure(1, 1, 6, 3.4)
  similarity = analysis['expert_similarity']
  names = analysis['routers']['names']
  places = np.arange(len(names))
  axes.plot(
    places, _array(similarity['measured']), 'o-', color=COLOURS[0], label='run'
  )
  axes.plot(
    places,
    _array(similarity['random']),
    ':',
    color=GREY,
    label='random initialisation',
  )
  _name_ticks(axes, names)
  axes.set(xlabel='router', ylabel='mean cosine of two experts')
  axes.set_title(f'Expert similarity ({analysis["run"]})', loc='left')
  axes.legend()
  return figure


def norms(analysis: Analysis) -> Figure:
  """Draws the norms of the experts, and of the routers' weights for them."""
  there = {k: v for k, v in analysis['norms'].items() if v is not None}
  figure, [row] = _figure(1, len(there), 5 * len(there), 3.6)
  for axes, (key, values) in zip(row, there.items(), strict=True):
    values = _array(values)
    experts = list(map(str, range(values.shape[1])))
    _heat(axes, values, analysis['routers']['names'], experts, 'norm')
    axes.set(xlabel='expert', ylabel='router')
    of = 'router weights' if key == 'router' else key
    axes.set_title(f'Norms of {of} ({analysis["run"]})', loc='left')
  return figure


def pairs(analysis: Analysis) -> Figure:
  """Draws how pairs of experts share the tokens (CartesianMoE)."""
  found = analysis['pairs']
  columns = min(4, len(found['shares']))
  rows = math.ceil(len(found['shares']) / columns)
  figure, grid = _figure(rows, columns, 3.2 * columns, 3 * rows)
  panels = [axes for row in grid for axes in row]
  for axes in panels[len(found['shares']) :]:
    axes.set_axis_off()
  for axes, name, shares, live in zip(
    panels, found['names'], found['shares'], found['live'], strict=False
  ):
    values = _array(shares)
    experts = list(map(str, range(len(values))))
    _heat(axes, values * values.size, experts, experts, 'times the even share')
    axes.set_title(f'{name}: {live:.0%} of the pairs live', loc='left')
    first, second = name.split(' x ')
    axes.set(xlabel=f'expert of {second}', ylabel=f'expert of {first}')
  return figure


def agreement(analysis: Analysis) -> Figure:
  """Draws how far routers choose as the ones below them do."""
  figure, [[axes]] = _figure(1, 1, 6, 3.4)
  names = analysis['routers']['names']
  places = np.arange(len(names))
  found = analysis['agreement']
  axes.bar(places, _array(found['below']), color=COLOURS[0], label='measured')
  axes.plot(
    places,
    _array(found['chance']),
    'D',
    color=COLOURS[1],
    markeredgecolor='white',
    label='by chance',
  )
  _name_ticks(axes, names)
  axes.set(xlabel='router', ylabel='choices as in the router below')
  axes.set_title(f'Agreement ({analysis["run"]})', loc='left')
  axes.legend()
  return figure


def classes(analysis: Analysis) -> Figure:
  """Draws which classes of tokens go to which expert."""
  found = analysis['token_classes']
  share, base = _array(found['share']), _array(found['base'])
  lift = np.divide(
    share, base, out=np.full(share.shape, np.nan), where=base > 0
  )
  names = analysis['routers']['names']
  columns = min(3, len(names))
  rows = math.ceil(len(names) / columns)
  figure, grid = _figure(rows, columns, 4 * columns, 2.6 * rows)
  panels = [axes for row in grid for axes in row]
  for axes in panels[len(names) :]:
    axes.set_axis_off()
  for axes, name, lift_NC in zip(panels, names, lift, strict=False):
    experts = list(map(str, range(len(lift_NC))))
    _heat(axes, lift_NC.T, found['classes'], experts, 'times the base', 2)
    axes.set_title(f'router {name}', loc='left')
    axes.set_xlabel('expert')
  return figure


def checkpoints(analysis: Analysis) -> Figure:
  """Draws what changes along the run's checkpoints (RMoE table 11)."""
  figure, grid = _figure(2, 2, 10, 6)
  found, names = analysis['checkpoints'], analysis['routers']['names']
  gradients = found['gradient_norm']
  steps = found['steps']
  for axes, title, at, values in (
    (grid[0][0], 'Assignments kept', steps[1:], found['route_stability']),
    (grid[0][1], 'Drop ratio at capacity 1', steps, found['drop_ratio']),
    (
      grid[1][0],
      'Router gradient: cross-entropy',
      steps,
      gradients['cross_entropy'],
    ),
    (
      grid[1][1],
      'Router gradient: balance loss',
      steps,
      gradients['balance_loss'],
    ),
  ):
    if not at:
      axes.set_axis_off()
      axes.text(0.5, 0.5, 'one checkpoint', ha='center')
      continue
    columns = list(_array(values).T)
    _lines_by_depth(axes, names, [np.array(at)] * len(names), columns, 'o-')
    axes.set_xlabel('step')
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc='left')
    number_steps(axes)
  return figure


# By the key of the analysis that a figure shows.
FIGURES: dict[str, Callable[[Analysis], Figure]] = {
  'mutual_information': mutual_information,
  'gate_entropy': gate_entropy,
  'inner_balance': inner_balance,
  'selection_frequency': selection_frequency,
  'expert_similarity': expert_similarity,
  'norms': norms,
  'pairs': pairs,
  'agreement': agreement,
  'token_classes': classes,
  'checkpoints': checkpoints,
}


def _figure(
  rows: int, columns: int, width: float, height: float
) -> tuple[Figure, Any]:
  figure = Figure(figsize=(width, height), layout='constrained')
  return figure, figure.subplots(rows, columns, squeeze=False)


def _array(values: Any) -> np.ndarray:
  """Returns numbers, NaN for None."""
  return np.array(values, dtype=float)


def _heat(
  axes: Axes,
  values: np.ndarray,
  rows: Sequence[str],
  columns: Sequence[str],
  unit: str,
  highest: float | None = None,
) -> None:
  """Draws a matrix with a scale beside it."""
  image = axes.imshow(
    values,
    cmap='viridis',
    aspect='auto',
    vmin=0,
    vmax=highest,
    interpolation='nearest',
  )
  axes.grid(visible=False)
  _name_ticks(axes, columns)
  _name_ticks(axes, rows, 'y')
  extend = 'neither' if highest is None else 'max'
  axes.figure.colorbar(image, ax=axes, label=unit, extend=extend)


def _name_ticks(axes: Axes, names: Sequence[str], axis: str = 'x') -> None:
  every = math.ceil(len(names) / _MOST_NAMED)
  places = range(0, len(names), every)
  axes.set(**{f'{axis}ticks': places})
  axes.set(**{f'{axis}ticklabels': [names[i] for i in places]})


def _with_quartiles(
  axes: Axes, names: Sequence[str], balance: dict[str, Any]
) -> None:
  """Draws medians, and bars from quartile to quartile."""
  places = np.arange(len(names))
  lower, upper = _array(balance['quartiles']).T
  median = _array(balance['median'])
  axes.errorbar(
    places,
    median,
    yerr=[median - lower, upper - median],
    fmt='o',
    color=COLOURS[0],
    ecolor=COLOURS[5],
    elinewidth=3,
  )
  _name_ticks(axes, names)


def _lines_by_depth(
  axes: Axes,
  names: Sequence[str],
  x: Sequence[np.ndarray],
  y: Sequence[Any],
  form: str = '-',
) -> None:
  """Draws a line for each router, dark to light with depth."""
  colours = matplotlib.colormaps['viridis'](np.linspace(0, 0.88, len(names)))
  count = min(len(names), _MOST_LINES)
  named = np.linspace(0, len(names) - 1, count).round()
  for i, name in enumerate(names):
    axes.plot(
      x[i],
      _array(y[i]),
      form,
      color=colours[i],
      linewidth=1.3,
      markersize=3,
      label=name if i in named else '_',
    )
  axes.legend(title='router', ncols=2, title_fontsize=8)
