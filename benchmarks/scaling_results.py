"""Keeps the rows of `benchmarks.scaling`, as a table and as a picture."""

import itertools
import json
import shlex
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_jax import strict_json
from moe_jax.errors import UserError
from moe_jax.planning.gpus import GPUS

_GIB = 1 << 30
_HEAD = """# Training steps compiled for {devices}

None of them was there: the figures are their compiler's, and nothing was timed
but the compilation. From a checkout, these commands make `scaling.jsonl`, its
table below and its picture, `scaling.png`:

"""
_ABOUT = """
The batch grows with the devices. Memory is what the program needs; bytes are
sent by all devices together, where every assignment finds room in the buffers
of its exchange.

The roofline is that of `moe_jax plan`: every kernel takes its bytes at 80 % of
the memory's published bandwidth or its matmuls at 70 % of the peak, whichever
is longer, nothing overlaps, and collectives take no time.

"""
_ABOUT_GPUS = """What the compiler cannot know without the device, it does not
count: which kernel is the fastest for a plain matmul, and cuDNN's workspace.

Measured, and published for MoE in bfloat16: Levanter's on 8 x H100, 64 experts,
has an MFU of 26.7 to 28.2 % (https://github.com/marin-community/marin, issue
6979); Megatron Bridge's Qwen3 235B on H100 about 30 %
(https://docs.nvidia.com/nemo/megatron-bridge, performance summary).

"""
_ABOUT_TPUS = """The compiler's own estimate is the cycles that it expects of
fusions, and what kernels take at the peak. Of matmuls it is good, of what moves
data far too dear: a sum over a large array is expected at a tenth to a seventh
of the memory's published bandwidth (`tests/planning/test_tpu_cycles.py`). So it
compares programs, and no step is bound by it. In the roofline attention fills
the matrix unit as far as its heads are wide.

Measured, and published for MoE in bfloat16: MaxText's Mixtral 8x7B has an MFU
of 52.6 % on v5p-256 and 35.2 % on v6e, 8x22B 36.2 %
(https://maxtext.readthedocs.io, tiers of models). Its experts are 14336 wide,
its heads 128; those here are 448 or 2048 and 64.

"""
_FLOOR = """
Where the time of the roofline goes, in ms:

"""
_PARTS = {
  'attention': 'attention',
  'experts, matmuls': 'grouped matmul',
  'experts, rows': 'permutation and activation of experts',
  'dense layers': 'dense layers',
  'router': 'router',
  'head': 'head',
  'optimizer': 'optimizer',
  'fetched ahead': 'prefetch',
}
_COLUMNS = (
  'model',
  'slice',
  'mesh (data, fsdp, expert)',
  'tokens per step',
  'GiB per device',
  'sent per token, KiB',
  'compile, s of CPU',
  'compiler, ms',
  'its MFU, %',
  'roofline, ms',
  'its MFU, %',
)


def check() -> None:
  """Refuses to begin what `keep` could not end.

  Raises:
    UserError: matplotlib is not installed.
  """
  if find_spec('matplotlib') is None:
    raise UserError("--results needs matplotlib: pip install -e '.[eval]'")


def keep(row: dict[str, Any], folder: Path) -> None:
  """Adds a row to a folder, in place of an older one of the same case."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'scaling.jsonl'
  rows = {}
  if path.exists():
    lines = path.read_text('utf-8').splitlines()
    rows = {_case(old): old for old in map(json.loads, lines)}
  rows[_case(row)] = row
  kept = [rows[case] for case in sorted(rows)]
  lines = [strict_json.dumps(each) + '\n' for each in kept]
  path.write_text(''.join(lines), 'utf-8')
  (folder / 'README.md').write_text(readme(kept), 'utf-8')
  draw(kept, folder / 'scaling.png')


def readme(rows: list[dict[str, Any]]) -> str:
  """What the rows are, in Markdown: the commands that made them, the table."""
  topologies: dict[tuple[str, str], list[str]] = {}
  for row in rows:
    case = row['arguments'], row['label']
    topologies.setdefault(case, []).append(row['topology'])
  commands = [
    f'    python -m benchmarks.scaling {arguments} \\\n'
    f'      --topologies={",".join(names)} \\\n'
    f'      --label={shlex.quote(label)} --results=DIR\n'
    for (arguments, label), names in topologies.items()
  ]
  kinds = {row['topology'].partition(':')[0] for row in rows}
  tables = table(rows) + _FLOOR + floor_table(rows)
  if kinds <= GPUS.keys():
    about, devices = _ABOUT + _ABOUT_GPUS, 'GPUs'
  else:
    about, devices = _ABOUT + _ABOUT_TPUS, 'slices of TPUs'
  head = _HEAD.format(devices=devices)
  return head + ''.join(commands) + about + tables


def table(rows: list[dict[str, Any]]) -> str:
  """The rows in Markdown."""
  return _markdown(_COLUMNS, map(_cells, rows))


def floor_table(rows: list[dict[str, Any]]) -> str:
  """The parts of every roofline in Markdown, what has no column as `other`."""
  columns = 'model', 'slice', *_PARTS, 'other'
  known = [row for row in rows if row['fits'] and row.get('roofline')]
  return _markdown(columns, map(_parts, known))


def _markdown(columns: tuple[str, ...], lines: Iterable[list[str]]) -> str:
  """A table of the columns that are not empty in every line."""
  lines = list(lines)
  used = [any(line[i] for line in lines) for i in range(len(columns))]
  lines = [list(columns), ['---'] * len(columns), *lines]
  kept = (itertools.compress(line, used) for line in lines)
  return ''.join('| ' + ' | '.join(line) + ' |\n' for line in kept)


def _parts(row: dict[str, Any]) -> list[str]:
  parts = row['roofline']['parts']
  seconds = {name: each['seconds'] for name, each in parts.items()}
  known = [seconds.pop(name, 0.0) for name in _PARTS.values()]
  shown = [*known, sum(seconds.values())]
  cells = [f'{1000 * each:,.0f}' for each in shown]
  return [row['label'], row['topology'], *cells]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
  """Memory, bytes sent and compile time over the number of chips."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  panels = {
    'memory per device, GiB': lambda row: row['memory_bytes']['total'] / _GIB,
    'sent per token, KiB': lambda row: row['sent_bytes_per_token'] / 1024,
    'compile, seconds of CPU': lambda row: row['compile_cpu_seconds'],
  }
  below = {'loc': 'outside lower center', 'ncols': 4}
  figure, axes = pyplot.subplots(
    1, len(panels), figsize=(12, 3.6), layout='constrained'
  )
  _limit(axes[0], rows)
  curves: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    if row['fits']:
      curves.setdefault(_curve(row, rows), []).append(row)
  for axis, (title, value) in zip(axes, panels.items(), strict=True):
    for label, curve in curves.items():
      chips = [row['num_devices'] for row in curve]
      axis.plot(chips, [value(row) for row in curve], 'o-', label=label)
    axis.set(title=title, xlabel='devices', xscale='log')
    axis.set_xticks(
      sorted({row['num_devices'] for row in rows}),
      sorted({row['num_devices'] for row in rows}),
    )
    axis.set_xticks([], minor=True)
    axis.margins(y=0.1)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
  figure.legend(*axes[0].get_legend_handles_labels(), **below)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def _limit(axis: Any, rows: list[dict[str, Any]]) -> None:
  """What a device holds, and what would need more, in the panel of memory."""
  refused = [row for row in rows if not row['fits']]
  if refused:
    chips = [row['num_devices'] for row in refused]
    needed = [row['needed_bytes'] / _GIB for row in refused]
    axis.plot(chips, needed, 'kx', label='does not fit, needs at least')
  for available in {row['available_bytes'] for row in rows}:
    axis.axhline(available / _GIB, color='gray', ls='--', label='of a device')


def _case(row: dict[str, Any]) -> tuple[str, int, str]:
  """What no two rows share, and the order that they are in."""
  return row['label'], row['num_devices'], row['topology']


def _curve(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
  """Its label, with the kind of chip where the rows have several."""
  kinds = {each['topology'].partition(':')[0] for each in rows}
  if len(kinds) == 1:
    return row['label']
  return f'{row["label"]}, {row["topology"].partition(":")[0]}'


def _cells(row: dict[str, Any]) -> list[str]:
  mesh = row['mesh']
  cells = [
    row['label'],
    row['topology'],
    ' x '.join(str(mesh[axis]) for axis in ('data', 'fsdp', 'expert')),
    f'{row["tokens_per_step"]:,}',
  ]
  if not row['fits']:
    needed = f'does not fit: {row["needed_bytes"] / _GIB:.2f}'
    return [*cells, needed, *[''] * 6]
  return [
    *cells,
    f'{row["memory_bytes"]["total"] / _GIB:.2f}',
    f'{row["sent_bytes_per_token"] / 1024:,.1f}',
    f'{row["compile_cpu_seconds"]:,.0f}',
    *_time(row['cycles']),
    *_roofline(row.get('roofline')),
  ]


def _time(cycles: dict[str, Any] | None) -> list[str]:
  """The milliseconds and the bound, empty where the clock is not published."""
  if cycles is None or cycles['mfu_bound'] is None:
    return ['', '']
  seconds = cycles['fusion_seconds'] + cycles['kernel_seconds']
  return [f'{1000 * seconds:,.0f}', f'{100 * cycles["mfu_bound"]:.1f}']


def _roofline(roofline: dict[str, Any] | None) -> list[str]:
  """The milliseconds and the bound, empty in a row of before there was one."""
  if roofline is None:
    return ['', '']
  seconds, bound = roofline['seconds'], roofline['mfu_bound']
  return [f'{1000 * seconds:,.0f}', f'{100 * bound:.1f}']
