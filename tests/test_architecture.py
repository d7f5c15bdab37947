"""Who may import whom: `ROOMS` is the house's floor plan.

A room is a package or a module of `moe_jax`; a module belongs to the longest
name that fits. Imports inside functions count like all others.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Room(NamedTuple):
  """What a room may import beside itself and the standard library."""

  rooms: str = ''  # of moe_jax, all earlier in the table
  packages: str = ''  # others' packages


_CONFIG = 'config errors files strict_json'
_MODEL = f'{_CONFIG} registry parameter routing experts parallel.mesh'
_STATE = 'jax flax optax orbax etils ml_collections numpy'

# A room imports only from those before it.
ROOMS = {
  '__init__': Room(),
  'errors': Room(),
  'files': Room('errors'),
  'strict_json': Room(),
  'registry': Room('errors'),
  'runtime': Room(),
  'disk': Room('errors'),
  'signals': Room(),
  'exits': Room('errors disk signals'),
  # A mistake in a config is told before jax is imported.
  'config': Room('errors files registry strict_json', 'ml_collections'),
  'cli': Room('config errors files runtime exits', 'absl ml_collections'),
  # The papers' equations know nothing of meshes, files or training.
  'parameter': Room('', 'jax flax'),
  'routing': Room('errors registry parameter', 'jax flax'),
  # An optional package, imported where it is used.
  'parallel.devices': Room('', 'jax'),
  'experts.grouped_matmul.tokamax': Room(
    'strict_json parallel.devices', 'jax tokamax absl'
  ),
  'experts': Room(
    'registry parameter routing parallel.devices'
    ' experts.grouped_matmul.tokamax',
    'jax flax ml_collections',
  ),
  'parallel.slices': Room('config errors', 'jax ml_collections numpy'),
  'parallel.mesh': Room(
    'config errors parameter parallel.slices parallel.devices',
    'jax ml_collections',
  ),
  'parallel.context': Room('parallel.mesh', 'jax'),
  'parallel.multihost': Room('errors', 'jax numpy orbax'),
  'parallel.peers': Room('errors', 'jax numpy'),
  'parallel.launch': Room('errors runtime parallel.peers', 'jax'),
  # No jax, so that reading data never touches a device.
  'data': Room(
    'config errors disk files registry strict_json',
    'tensorflow_datasets array_record pyarrow datasets grain numpy etils'
    ' ml_collections tokenizers sentencepiece',
  ),
  'model': Room(
    f'{_MODEL} parallel.devices parallel.context'
    ' experts.grouped_matmul.tokamax',
    'jax flax ml_collections',
  ),
  'interop': Room(
    f'{_CONFIG} model',
    'jax flax ml_collections ml_dtypes numpy safetensors',
  ),
  'interop.tokenizer_files': Room('data errors strict_json', 'tokenizers'),
  'generation': Room(f'{_MODEL} data model', 'jax flax ml_collections numpy'),
  'training': Room(
    f'{_MODEL} disk signals data parallel.multihost model generation',
    f'{_STATE} tensorboardX wandb trackio',
  ),
  'evaluation.likelihood': Room(
    'config data errors parallel.mesh parallel.multihost training', 'numpy'
  ),
  # An optional package, imported where tasks are asked for.
  'evaluation.tasks': Room('errors files', 'lm_eval datasets huggingface_hub'),
  'evaluation.harness': Room(
    'config errors data generation parallel.multihost training'
    ' evaluation.likelihood',
    'jax numpy lm_eval tqdm',
  ),
  'evaluation': Room(
    f'{_CONFIG} registry disk data parallel.mesh parallel.multihost routing'
    ' model training evaluation.tasks evaluation.harness',
    'jax flax ml_collections numpy lm_eval',
  ),
  # The one page that knows everyone.
  'training.loop': Room(
    f'runtime {_CONFIG} data parallel.multihost parallel.peers training'
    ' evaluation',
    'jax ml_collections',
  ),
  # From and to the workdirs of runs.
  'interop.checkpoint': Room(
    f'{_CONFIG} data parallel.mesh parameter interop training',
    'jax ml_collections numpy',
  ),
  'interop.convert': Room(
    f'{_CONFIG} disk data interop interop.checkpoint interop.tokenizer_files',
    'jax flax ml_collections numpy',
  ),
  'interop.cli': Room(
    'cli errors files interop interop.convert runtime', 'absl ml_collections'
  ),
  # The library's doors.
  'layers': Room(
    'config parameter routing experts model', 'jax flax ml_collections'
  ),
  'pretrained': Room(
    f'{_MODEL} data generation interop interop.checkpoint model',
    'jax flax ml_collections numpy',
  ),
  'analysis': Room(
    f'{_CONFIG} disk exits',
    'altair jinja2 matplotlib ml_collections numpy vl_convert',
  ),
  # Of a `Routing` alone, and of the documents of a split.
  'analysis.routing': Room('routing', 'jax numpy'),
  'analysis.token_classes': Room('data', 'numpy'),
  'analysis.parameters': Room(
    'config parameter model analysis.routing', 'jax flax ml_collections'
  ),
  'analysis.analyze': Room(
    f'{_CONFIG} disk data routing experts parallel.mesh parallel.multihost'
    ' model training analysis analysis.routing analysis.token_classes'
    ' analysis.parameters',
    'jax flax ml_collections numpy',
  ),
  # Text in, numbers out.
  'planning.hlo': Room(),
  'planning.replica_groups': Room(),
  'planning.collectives': Room('planning.hlo planning.replica_groups'),
  'planning.tpu_cycles': Room('planning.hlo'),
  'planning.gpus': Room('errors runtime'),
  'planning.roofline': Room('planning.hlo planning.tpu_cycles'),
  'planning': Room(
    f'{_CONFIG} runtime data parallel.mesh experts model training planning.hlo'
    ' planning.collectives planning.replica_groups planning.gpus'
    ' planning.roofline planning.tpu_cycles',
    'jax flax ml_collections',
  ),
  'analysis.compare': Room(f'{_CONFIG} model planning', 'ml_collections'),
  'analysis.compare_table': Room('analysis.compare training'),
  'analysis.comparison': Room(
    f'{_CONFIG} disk analysis analysis.compare evaluation training', 'scipy'
  ),
  # The command: each program imports what it runs when it runs.
  'programs.presets': Room('cli config errors'),
  'programs.tokenizer': Room(
    'cli disk errors files data', 'absl ml_collections'
  ),
  'programs.train': Room('cli parallel.launch training.loop', 'ml_collections'),
  'programs.doctor': Room(
    'cli config errors runtime strict_json data parallel.launch'
    ' parallel.multihost training',
    'absl jax',
  ),
  'programs.eval': Room(
    'cli config errors files parallel.launch evaluation',
    'absl ml_collections',
  ),
  'programs.token_colours': Room(),
  'programs.generating': Room(
    f'{_CONFIG} data generation parallel.multihost training'
    ' programs.token_colours',
    'ml_collections numpy',
  ),
  'programs.generate': Room(
    'cli errors files parallel.launch programs.generating',
    'absl ml_collections',
  ),
  'programs.analyze': Room(
    'cli errors parallel.launch analysis.analyze programs.eval',
    'absl ml_collections',
  ),
  'plan': Room('cli planning', 'absl ml_collections'),
  '__main__': Room('exits errors'),
  'programs.child': Room('__main__'),
  'programs.pool': Room('errors runtime signals'),
  'programs.comparing': Room(
    f'{_CONFIG} analysis analysis.compare analysis.compare_table'
    ' analysis.comparison data programs.pool training',
    'jax',
  ),
  'programs.compare': Room('cli programs.comparing runtime', 'absl'),
}


def modules() -> dict[str, Path]:
  """Every module by its dotted name below `moe_jax`."""
  package = ROOT / 'moe_jax'
  found = {}
  for path in sorted(package.rglob('*.py')):
    parts = path.relative_to(package).with_suffix('').parts
    found['.'.join(parts)] = path
  return found


def room_of(name: str) -> str | None:
  """The longest room that `name` lies in."""
  parts = name.split('.')
  fitting = ('.'.join(parts[:n]) for n in range(len(parts), 0, -1))
  return next((room for room in fitting if room in ROOMS), None)


def imports(path: Path) -> set[str]:
  """The dotted names a file imports, `from a import b` as `a.b`."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text('utf-8'))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path} has a relative import'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


def below(name: str) -> str | None:
  """`moe_jax.a.b` -> `a.b`; None for what is not ours."""
  package, _, rest = name.partition('.')
  return rest if package == 'moe_jax' and rest else None


def test_modules_import_only_what_their_room_may() -> None:
  known = modules()
  problems = [
    problem for name in known for problem in forbidden(name, known[name])
  ]
  assert not problems, '\n'.join(problems)


def forbidden(name: str, path: Path) -> Iterator[str]:
  """What a module imports and its room may not, one line each."""
  room = room_of(name)
  if name.endswith('__init__') and room is None:
    room = '__init__'
  if not room:
    yield f'moe_jax.{name} has no room in ROOMS'
    return
  may = ROOMS[room]
  for imported in imports(path):
    ours = below(imported)
    if ours:
      into = room_of(ours)
      if into != room and into not in may.rooms.split():
        yield f'{name} ({room}) imports {imported} ({into})'
      continue
    package = imported.split('.')[0]
    known = package in sys.stdlib_module_names
    if not known and package not in may.packages.split():
      yield f'{name} ({room}) imports {imported}'


def test_rooms_import_only_from_earlier_ones() -> None:
  order = list(ROOMS)
  for place, (room, may) in enumerate(ROOMS.items()):
    for other in may.rooms.split():
      assert other in order[:place], f'{room} may not import {other}'


def test_modules_do_not_import_in_circles() -> None:
  known = modules()
  edges = {}
  for name, path in known.items():
    ours = {below(imported) for imported in imports(path)} - {None}
    # The name after the last dot may be a module or something in one.
    edges[name] = {
      module
      for each in ours
      for module in (each, each.rpartition('.')[0])
      if module in known
    }

  finished: set[str] = set()

  def visit(name: str, path: tuple[str, ...]) -> None:
    assert name not in path, f'a circle: {" -> ".join((*path, name))}'
    if name not in finished:
      for other in edges[name]:
        visit(other, (*path, name))
      finished.add(name)

  for name in known:
    visit(name, ())


def test_every_folder_of_modules_is_in_the_wheel() -> None:
  """Which has packages alone: folders without __init__.py are left out."""
  for path in modules().values():
    assert (path.parent / '__init__.py').exists(), path


def test_nothing_imports_configs_tests_or_benchmarks() -> None:
  for name, path in modules().items():
    packages = {imported.split('.')[0] for imported in imports(path)}
    assert not packages & {'configs', 'tests', 'benchmarks'}, name


@pytest.mark.parametrize(
  'folder', ['moe_jax', 'configs', 'benchmarks', 'tests']
)
def test_no_file_imports_the_private_parts_of_jax_or_flax(folder: str) -> None:
  for path in sorted((ROOT / folder).rglob('*.py')):
    for imported in imports(path):
      parts = imported.split('.')
      private = any(part.startswith('_') for part in parts[1:])
      assert parts[0] not in ('jax', 'flax', 'optax') or not private, (
        f'{path} imports {imported}'
      )


def test_no_file_reaches_into_jax_src() -> None:
  for path in [*modules().values(), *(ROOT / 'benchmarks').rglob('*.py')]:
    assert 'jax._src' not in path.read_text('utf-8'), path


def test_configs_import_nothing_that_imports_jax() -> None:
  for path in sorted((ROOT / 'configs').glob('*.py')):
    for imported in imports(path):
      allowed = ('collections', 'ml_collections', 'configs', 'moe_jax')
      assert imported.split('.')[0] in allowed, f'{path} imports {imported}'
      assert below(imported) is None or room_of(below(imported)) == 'config'
