"""Draws training curves and the balance of the experts from metrics.jsonl.

  moe_jax plots runs/quickstart
  moe_jax plots runs/a runs/b --output=both.png

The picture of one run shows every MoE layer, that of several compares them.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax import disk, exits
from moe_jax.analysis.runs import Run, read, smooth
from moe_jax.errors import UserError, said
from moe_jax.files import check_output, expand

try:
  import matplotlib
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator
except ImportError as error:
  raise UserError(
    f"pictures need the package {error.name}: pip install 'moe_jax[eval]'"
  ) from error

# Okabe and Ito's colours, told apart by all common kinds of colour vision.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
GREY = '#555555'
_MOST_NAMED = 6  # layers in the legend


def draw(runs: Sequence[Run]) -> Figure:
  """Draws the losses of runs, and beside them how evenly experts are used.

  Of one run every MoE layer is drawn, of several each run's least balanced.
  """
  dropping = any(run.dropped_PW.any() for run in runs)
  with style():
    figure = Figure(figsize=(10, 4), layout='constrained')
    [[left, right]] = figure.subfigures(
      1, 2, squeeze=False, width_ratios=(1.15, 1)
    )
    _draw_losses(left.subplots(), runs)
    if dropping:
      load, dropped = right.subplots(2, sharex=True, height_ratios=(3, 2))
      _draw_layers(
        dropped, runs, [100 * run.dropped_PW for run in runs], legend=False
      )
      dropped.set(xlabel='step', ylabel='dropped assignments, %')
      dropped.set_ylim(bottom=0)
    else:
      load = right.subplots()
      load.set_xlabel('step')
    _draw_layers(load, runs, [run.max_load_PW for run in runs], legend=True)
    load.set_ylabel('rows of the busiest expert\n(1 = balanced)')
    load.set_title('Balance of the experts', loc='left')
    if load.lines:
      load.axhline(1, color=GREY, linestyle=':', linewidth=1)
      load.set_ylim(bottom=0)
  return figure


def style() -> contextlib.AbstractContextManager[None]:
  """Returns a context in which figures look as those of the library."""
  return matplotlib.rc_context(
    {
      'font.size': 9.0,
      'axes.spines.top': False,
      'axes.spines.right': False,
      'axes.grid': True,
      'axes.axisbelow': True,
      'grid.color': '#E6E6E6',
      'legend.frameon': False,
      'legend.fontsize': 8.0,
    }
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """Draws what the command line asks for; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog='moe_jax plots',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('workdir', nargs='+', help='the directory of a run')
  parser.add_argument('--output', help='the picture; WORKDIR/curve.png')
  flags = parser.parse_args(arguments)
  try:
    workdirs = [expand(each) for each in flags.workdir]
    output = os.path.join(workdirs[0], 'curve.png')
    if flags.output:
      output = expand(flags.output)
      check_output('--output', output, 'curve.png')
      if not os.path.splitext(output)[1]:
        output += '.png'  # as matplotlib would
    figure = draw([read(workdir) for workdir in workdirs])
    _save(figure, output)
  except UserError as error:
    print('error:', said(error), file=sys.stderr)
    return 2
  print(f'written to {output}')
  return 0


def _draw_losses(axes: Axes, runs: Sequence[Run]) -> None:
  for run, colour in zip(runs, _cycle(len(runs)), strict=True):
    prefix = f'{run.name}: ' if len(runs) > 1 else ''
    axes.plot(run.steps_P, run.loss_P, color=colour, alpha=0.25, linewidth=1)
    axes.plot(
      run.steps_P,
      smooth(run.loss_P),
      color=colour,
      linewidth=1.8,
      label=f'{prefix}training',
    )
    splits = zip('osD^v', run.evaluations.items(), strict=False)
    for marker, (split, rows) in splits:
      axes.plot(
        [row['step'] for row in rows],
        [float(row['loss']) for row in rows],
        color=colour if len(runs) > 1 else COLOURS[1],
        marker=marker,
        linestyle='none',
        markeredgecolor='white',
        markersize=6.5,
        label=prefix + _evaluation_label(split, rows[-1]),
      )
  axes.set(xlabel='step', ylabel='loss, nats per token')
  title = 'Loss' if len(runs) > 1 else f'Loss ({runs[0].name})'
  axes.set_title(title, loc='left')
  number_steps(axes)
  axes.legend(loc='upper right')


def _evaluation_label(split: str, last: dict[str, Any]) -> str:
  if 'bits_per_byte' not in last:
    return split
  return f'{split} (last: {float(last["bits_per_byte"]):.3f} bits per byte)'


def _draw_layers(
  axes: Axes,
  runs: Sequence[Run],
  values: Sequence[np.ndarray],
  legend: bool,
) -> None:
  """Draws a line per layer of one run, or per run the highest of its layers."""
  if len(runs) > 1:
    for run, values_PW, colour in zip(
      runs, values, _cycle(len(runs)), strict=True
    ):
      if values_PW.size:
        highest_P = smooth(values_PW.max(1))
        axes.plot(run.steps_P, highest_P, color=colour, label=run.name)
  else:
    _draw_each_layer(axes, runs[0].steps_P, values[0])
  number_steps(axes)
  if legend and axes.lines:
    title = 'highest of the MoE layers' if len(runs) > 1 else 'MoE layer'
    axes.legend(title=title, loc='upper right', ncols=2, title_fontsize=8)
  elif not axes.lines:
    axes.set_axis_off()
    axes.text(0.5, 0.5, 'no MoE layer', transform=axes.transAxes, ha='center')


def _draw_each_layer(
  axes: Axes, steps_P: np.ndarray, values_PW: np.ndarray
) -> None:
  num_layers = values_PW.shape[1]
  # Dark to light with depth; the lightest yellow is too pale for a line.
  colours = matplotlib.colormaps['viridis'](np.linspace(0, 0.88, num_layers))
  count = min(num_layers, _MOST_NAMED)
  named = np.linspace(0, num_layers - 1, count).round()
  for layer in range(num_layers):
    axes.plot(
      steps_P,
      smooth(values_PW[:, layer]),
      color=colours[layer],
      linewidth=1.3,
      label=f'{layer + 1}' if layer in named else '_',
    )


def number_steps(axes: Axes) -> None:
  """Marks few steps along the axis, whole ones."""
  axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
  axes.xaxis.set_major_formatter('{x:,.0f}')


def _cycle(count: int) -> list[str]:
  return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _save(figure: Figure, output: str) -> None:
  try:
    figure.savefig(output, dpi=200)
  except OSError as error:
    raise disk.refused(output, error, kind='--output:') from error
  except ValueError as error:  # an unknown ending
    raise UserError(f'--output: {output} cannot be written: {error}') from error


if __name__ == '__main__':
  exits.exit_with(lambda: sys.exit(main()))
