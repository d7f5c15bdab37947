"""Damage to checkpoints and workdirs: nothing changes without a word.

What was saved comes back bit for bit, or one line names what is damaged; and
with `checkpoint.fallback` on the run goes on and ends as if nothing had been.
"""

import json
import os
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.data import folders
from moe_jax.errors import UserError
from moe_jax.training import health, loop, saved_step
from moe_jax.training.state import Setup
from tests.helpers import marks, runs, tiny

pytestmark = pytest.mark.slow

STEPS, EVERY = 8, 2
NEWEST, BEFORE = 6, 4  # when the last checkpoint is taken away


def largest(folder: Path) -> Path:
  files = [path for path in folder.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def rewrite(path: Path, change: Callable[[bytearray], object]) -> None:
  content = bytearray(path.read_bytes())
  change(content)
  path.write_bytes(content)


def random_state() -> dict[str, Any]:
  rng = np.random.default_rng(0)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  arrays = {
    'step': np.int32(1),
    'params': {
      'big': rng.standard_normal((100, 1000), np.float32),
      'half': rng.standard_normal((100, 100)).astype(jax.numpy.bfloat16),
      'bias': rng.standard_normal(50).astype(np.float32),
      'table': rng.integers(0, 9, (500, 4)).astype(np.int32),
    },
    'key': np.array([1, 2], np.uint32),
  }
  return jax.tree.map(lambda leaf: jax.device_put(leaf, one), arrays)


@pytest.mark.parametrize('flips', marks.at_first(1, (50, 200)))
def test_no_flipped_bit_is_restored(
  flips: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
  config = config_lib.get_config()
  state = random_state()
  with runs.claimed(config, tmp_path / 'whole') as store:
    store.save(1, state)
  saved = tmp_path / 'whole/checkpoints/1'
  files = sorted(path for path in saved.rglob('*') if path.is_file())
  sizes = [path.stat().st_size for path in files]
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  rng = random.Random(0)
  outcomes: Counter[str] = Counter()
  for number in range(flips):
    # Half of them anywhere in the bytes, half of them in any of the files.
    [at] = rng.choices(range(len(files)), sizes if number % 2 else None)
    place = rng.randrange(sizes[at])
    bits = (
      1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
    )
    workdir = tmp_path / str(number)  # a new one: reads are cached by path
    shutil.copytree(tmp_path / 'whole', workdir)
    damaged = workdir / files[at].relative_to(tmp_path / 'whole')

    def flip(content: bytearray, place: int = place, bits: int = bits) -> None:
      content[place] ^= bits

    rewrite(damaged, flip)
    try:
      with runs.opened(config, workdir) as store:
        restored = store.restore(abstract)
    except UserError as error:
      assert str(workdir) in str(error) and '\n' not in str(error)
      outcomes['named'] += 1
    else:
      same = jax.tree.map(
        lambda one, other: (
          np.asarray(one).tobytes() == np.asarray(other).tobytes()
        ),
        restored.state,
        state,
      )
      assert (restored.step, restored.position) == (1, 1)
      outcomes['harmless' if all(jax.tree.leaves(same)) else 'silent'] += 1
    shutil.rmtree(workdir)
  out, err = capfd.readouterr()
  assert (out, err) == ('', '')
  with capfd.disabled():
    print(f'\n{flips} bits and bytes changed: {dict(outcomes)}')
  assert not outcomes['silent'] and outcomes['named'] > flips / 4


class Kind(NamedTuple):
  """A kind of damage.

  Attributes:
    damage: Does it, to the folder of the newest checkpoint.
    told: What the one line says; '' where there is nothing to say.
    goes_on: Whether the run goes on with `checkpoint.fallback` on.
    start: The step that it then goes on from.
  """

  damage: Callable[[Path], object]
  told: str = ''
  goes_on: bool = True
  start: int = BEFORE


def harmless(damage: Callable[[Path], object]) -> Kind:
  return Kind(damage, start=NEWEST)


def refused(damage: Callable[[Path], object], told: str) -> Kind:
  return Kind(damage, told, goes_on=False)


def big(at: Path) -> Path:
  return largest(at / 'state')


def edit_metadata(at: Path, change: Callable[[dict], object]) -> None:
  path = at / 'state/_METADATA'
  item = json.loads(path.read_text())
  change(item)
  path.write_text(json.dumps(item))


def edit_data(at: Path, sealed: bool = False, **entries: object) -> None:
  """Changes the item `data`; `sealed` is as if it had been saved so."""
  path = at / 'data/metadata'
  item = json.loads(path.read_text()) | entries
  if sealed:
    del item['checksum']
    item['checksum'] = saved_step._checksum(item)
  path.write_text(json.dumps(item))


def swap_blocks(content: bytearray) -> None:
  one, other = content[4096:8192], content[12288:16384]
  content[4096:8192], content[12288:16384] = other, one


def zero_block(content: bytearray) -> None:
  content[8192:12288] = bytes(4096)


def replace_with(path: Path, make: Callable[[Path], object]) -> None:
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  make(path)


def dangle(path: Path) -> None:
  path.symlink_to('nowhere')


def of(step: int, at: Path) -> Path:
  return at.parent / str(step)


def in_all(at: Path) -> None:
  for folder in at.parent.iterdir():
    (folder / 'data/metadata').write_text('null')


def of_step_4(at: Path, item: str) -> None:
  shutil.rmtree(at / item)
  shutil.copytree(of(BEFORE, at) / item, at / item)


def stray(at: Path) -> None:
  for name in ('notes', '0058', '-1', '7.bak', '7.orbax-checkpoint-tmp'):
    (at.parent / name).mkdir()
  (at.parent / 'readme.txt').write_text('')


def process_0(at: Path) -> Path:
  return at / 'state/ocdbt.process_0'


IS = 'is damaged: '
ARRAYS = {
  'one bit': Kind(
    lambda at: rewrite(big(at), lambda b: b.__setitem__(9999, b[9999] ^ 1)),
    'state: array ',
  ),
  'a block of zeros': Kind(lambda at: rewrite(big(at), zero_block), 'array '),
  'two blocks changed places': Kind(
    lambda at: rewrite(big(at), swap_blocks), 'array '
  ),
  'cut in half': Kind(
    lambda at: os.truncate(big(at), big(at).stat().st_size // 2), 'array '
  ),
  'a byte more': harmless(lambda at: rewrite(big(at), lambda b: b.append(1))),
  'emptied': Kind(lambda at: os.truncate(big(at), 0), 'array '),
  'garbage': Kind(lambda at: big(at).write_bytes(b'x' * 9999), 'array '),
  'deleted': Kind(lambda at: big(at).unlink(), 'array '),
  'bytes of another step': Kind(
    lambda at: shutil.copy(big(of(BEFORE, at)), big(at)), IS
  ),
  'a folder in its place': Kind(
    lambda at: replace_with(big(at), Path.mkdir), IS
  ),
}
FILES = {
  'no d': Kind(lambda at: shutil.rmtree(at / 'state/d'), 'state/d/'),
  'no manifest': Kind(lambda at: (at / 'state/manifest.ocdbt').unlink(), IS),
  'garbled manifest': Kind(
    lambda at: (at / 'state/manifest.ocdbt').write_bytes(b'x' * 99), IS
  ),
  'no arrays of a process': Kind(
    lambda at: shutil.rmtree(process_0(at)), 'array '
  ),
  'no manifest of a process': harmless(
    lambda at: (process_0(at) / 'manifest.ocdbt').unlink()
  ),
  'no _METADATA': Kind(lambda at: (at / 'state/_METADATA').unlink(), IS),
  'empty _METADATA': Kind(
    lambda at: os.truncate(at / 'state/_METADATA', 0), IS
  ),
  '_METADATA a list': Kind(
    lambda at: (at / 'state/_METADATA').write_text('[]'), IS
  ),
  '_METADATA empty': Kind(
    lambda at: (at / 'state/_METADATA').write_text('{}'), IS
  ),
  '_METADATA binary': Kind(
    lambda at: (at / 'state/_METADATA').write_bytes(bytes(range(256))), IS
  ),
  '_METADATA lacks an array': Kind(
    lambda at: edit_metadata(at, lambda item: item['tree_metadata'].popitem()),
    'does not describe what was saved',
  ),
  'no _sharding': harmless(lambda at: (at / 'state/_sharding').unlink()),
  'no state': Kind(lambda at: shutil.rmtree(at / 'state'), 'state'),
  'state a file': Kind(
    lambda at: replace_with(at / 'state', Path.touch), 'state'
  ),
  'state of another step': Kind(
    lambda at: of_step_4(at, 'state'), f'its state is of step {BEFORE}'
  ),
  'data of another step': Kind(
    lambda at: of_step_4(at, 'data'), f'data/metadata is of step {BEFORE}'
  ),
}
JSON = {
  'no data': Kind(lambda at: shutil.rmtree(at / 'data'), 'data'),
  'data cut': Kind(lambda at: os.truncate(at / 'data/metadata', 40), 'data'),
  'data empty': Kind(lambda at: os.truncate(at / 'data/metadata', 0), 'data'),
  'data a list': Kind(
    lambda at: (at / 'data/metadata').write_text('[1]'), 'no JSON object'
  ),
  'data null': Kind(
    lambda at: (at / 'data/metadata').write_text('null'), 'no JSON object'
  ),
  'data deep': Kind(
    lambda at: (at / 'data/metadata').write_text('[' * 99999), 'data'
  ),
  'data binary': Kind(
    lambda at: (at / 'data/metadata').write_bytes(bytes(range(256))), 'data'
  ),
  'another digest': Kind(
    lambda at: edit_data(at, digests={}), 'is not what was saved'
  ),
  'another digest, sealed': Kind(
    lambda at: edit_data(at, sealed=True, digests={'step': '0' * 16}), 'array '
  ),
  'another position': Kind(
    lambda at: edit_data(at, sealed=True, position=7), 'has position 7'
  ),
  'another step': Kind(
    lambda at: edit_data(at, sealed=True, step=7), 'is of step 7'
  ),
  'no config': harmless(lambda at: shutil.rmtree(at / 'config')),
  'garbled config': harmless(
    lambda at: (at / 'config/metadata').write_text('{')
  ),
  'no _CHECKPOINT_METADATA': harmless(
    lambda at: (at / '_CHECKPOINT_METADATA').unlink()
  ),
  '_CHECKPOINT_METADATA garbled': harmless(
    lambda at: (at / '_CHECKPOINT_METADATA').write_text('{bad')
  ),
  '_CHECKPOINT_METADATA a list': harmless(
    lambda at: (at / '_CHECKPOINT_METADATA').write_text('[]')
  ),
}
FOLDERS = {
  'not finished': Kind(
    lambda at: (at / 'commit_success.txt').unlink(), 'was not finished'
  ),
  'an item not finished': Kind(
    lambda at: (at / 'state/commit_success.txt').unlink(), 'was not finished'
  ),
  'an empty folder': Kind(lambda at: replace_with(at, Path.mkdir), IS),
  'a file': Kind(lambda at: replace_with(at, Path.touch), 'it is no folder'),
  'a dangling link': Kind(
    lambda at: replace_with(at, dangle), 'a symbolic link to nothing'
  ),
  'a link to another step': Kind(
    lambda at: replace_with(at, lambda path: path.symlink_to(of(BEFORE, at))),
    f'is of step {BEFORE}',
  ),
  'a copy of another step': Kind(
    lambda at: shutil.copytree(of(BEFORE, at), of(7, at)),
    f'checkpoints/7 is damaged: data/metadata is of step {BEFORE}',
    start=NEWEST,
  ),
  'renamed': Kind(
    lambda at: at.rename(of(7, at)),
    f'checkpoints/7 is damaged: data/metadata is of step {NEWEST}',
  ),
  'an empty folder of a later step': Kind(
    lambda at: of(58, at).mkdir(), 'checkpoints/58', start=NEWEST
  ),
  'a file of a later step': Kind(
    lambda at: of(58, at).touch(), 'checkpoints/58', start=NEWEST
  ),
  'other names': harmless(stray),
  'all of them': refused(in_all, IS),
}
WORKDIR = {
  'checkpoints a file': refused(
    lambda at: replace_with(at.parent, Path.touch), 'is no folder'
  ),
  'checkpoints a dangling link': refused(
    lambda at: replace_with(at.parent, dangle), 'is no folder'
  ),
  'config.json cut': refused(
    lambda at: os.truncate(at.parents[1] / 'config.json', 99), 'config.json'
  ),
  'config.json binary': refused(
    lambda at: (at.parents[1] / 'config.json').write_bytes(b'\xff\x00'),
    'config.json',
  ),
  'config.json a list': refused(
    lambda at: (at.parents[1] / 'config.json').write_text('[]'), 'config.json'
  ),
  'config.json a folder': refused(
    lambda at: replace_with(at.parents[1] / 'config.json', Path.mkdir),
    'cannot be read',
  ),
  'no config.json': harmless(
    lambda at: (at.parents[1] / 'config.json').unlink()
  ),
  'metrics cut': harmless(
    lambda at: rewrite(
      at.parents[1] / 'metrics.jsonl', lambda b: b.__delitem__(slice(-9, None))
    )
  ),
  'metrics garbled': refused(
    lambda at: rewrite(
      at.parents[1] / 'metrics.jsonl',
      lambda b: b.__setitem__(slice(0, 9), b'\xff' * 9),
    ),
    'metrics.jsonl:1 ',
  ),
  'metrics a folder': refused(
    lambda at: replace_with(at.parents[1] / 'metrics.jsonl', Path.mkdir),
    'metrics.jsonl is no file',
  ),
  'tensorboard a file': refused(
    lambda at: replace_with(at.parents[1] / 'tensorboard', Path.touch),
    'tensorboard is no folder',
  ),
  'run.json garbled': harmless(
    lambda at: (at.parents[1] / 'run.json').write_text('[')
  ),
}
KINDS = ARRAYS | FILES | JSON | FOLDERS | WORKDIR
SOME = [*KINDS][::5]  # of each group


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
  """A small run whose largest array has 10^5 elements."""
  texts = tmp_path_factory.mktemp('texts')
  names = (f'part-{i}.txt' for i in range(60))
  for name in names:
    if folders.split_of(name) == 'train':
      (texts / name).write_text(f'{name} is not long. ' * 20)
  return tiny.config(
    **{
      'data.name': 'text_folder',
      'data.path': str(texts),
      'data.dir': str(tmp_path_factory.mktemp('prepared')),
      'model.num_layers': 1,
      'moe.expert_width': 400,
      'train.steps': STEPS,
      'train.log_every': 1,
      'checkpoint.every': EVERY,
      'checkpoint.keep': 9,
      'eval.every': 0,
    }
  )


@pytest.fixture(scope='module', autouse=True)
def compiled_once() -> Iterator[None]:
  """All runs here are of one config; one of them compiles its step."""
  make = loop.make_train_step
  steps: list[Any] = []

  def make_once(setup: Setup) -> Any:
    if not steps:
      steps.append(make(setup))
    return steps[0]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'make_train_step', make_once)
    yield


@pytest.fixture(scope='module')
def straight(
  config: ConfigDict, tmp_path_factory: pytest.TempPathFactory
) -> Path:
  """The directory of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('straight')
  assert runs.call('train.py', runs.arguments(config, workdir)) == 0
  assert runs.checkpoints(workdir) == [2, BEFORE, NEWEST, STEPS]
  return workdir


@pytest.fixture(scope='module')
def figures() -> Iterator[Counter[str]]:
  counted: Counter[str] = Counter()
  yield counted
  print(f'\n{counted.total()} kinds of damage: {dict(counted)}')


def untouched(folder: Path) -> dict[str, bytes | None]:
  """All that a refused start leaves as it was; it may have noted itself."""
  snapshot = runs.snapshot(folder)
  return {
    path: content
    for path, content in snapshot.items()
    if Path(path).name not in ('config.json', 'run.json', '.lock')
  }


def digests_of(workdir: Path, step: int) -> dict[str, str]:
  """What every array of a checkpoint is; it is read and verified."""
  saved = saved_step.SavedStep(str(workdir / 'checkpoints'), step)
  assert saved.verify_all()
  return saved.data['digests']


@pytest.mark.parametrize(
  'name', marks.at_first(len(SOME), dict.fromkeys([*SOME, *KINDS]))
)
def test_each_kind_is_told_and_survived(
  name: str,
  config: ConfigDict,
  straight: Path,
  tmp_path: Path,
  capfd: pytest.CaptureFixture[str],
  figures: Counter[str],
) -> None:
  kind = KINDS[name]
  workdir = tmp_path / 'run'
  shutil.copytree(straight, workdir)
  at = workdir / 'checkpoints' / str(NEWEST)
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  kind.damage(at)
  before = runs.snapshot(tmp_path)
  found = health.examine(str(workdir))
  assert health.text(found) and json.dumps(found)
  assert runs.snapshot(tmp_path) == before
  before = untouched(tmp_path)
  flags = runs.arguments(config, workdir)
  capfd.readouterr()

  if kind.told:
    off = runs.call('train.py', [*flags, '--config.checkpoint.fallback=off'])
    out, err = capfd.readouterr()
    assert (off, out) == (2, ''), err
    (line,) = err.splitlines()
    assert line.startswith('error: ') and kind.told in line
    assert untouched(tmp_path) == before

  on = runs.call('train.py', [*flags, '--config.checkpoint.fallback=on'])
  out, err = capfd.readouterr()
  if not kind.goes_on:
    assert (on, out) == (2, ''), err
    (line,) = err.splitlines()
    assert line.startswith('error: ') and kind.told in line
    assert 'is refused' in found['next'] or 'an error' in found['next']
    figures['refused'] += 1
    return
  assert on == 0, err
  assert 'Traceback' not in err
  assert f'goes on from step {kind.start}' in found['next']
  if kind.told:
    lines = [line for line in err.splitlines() if 'set aside' in line]
    assert len(lines) == 1 and kind.told in lines[0], err
    assert len(os.listdir(workdir / 'checkpoints-damaged')) == 1
  assert runs.timeless_rows(workdir) == runs.timeless_rows(straight)
  assert digests_of(workdir, STEPS) == digests_of(straight, STEPS)
  figures['goes on from the one before' if kind.told else 'harmless'] += 1


def test_a_full_disk_costs_one_save(
  config: ConfigDict,
  tmp_path: Path,
  straight: Path,
  capfd: pytest.CaptureFixture[str],
) -> None:
  """Files may not grow beyond a size, so what is large cannot be saved."""
  workdir = tmp_path / 'run'
  shutil.copytree(straight, workdir)
  for step in (NEWEST, STEPS):
    shutil.rmtree(workdir / 'checkpoints' / str(step))
  flags = runs.arguments(config, workdir)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  size = big(workdir / f'checkpoints/{BEFORE}').stat().st_size
  resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
  try:
    status = runs.call('train.py', flags)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  out, err = capfd.readouterr()
  assert status == os.EX_TEMPFAIL
  line = err.splitlines()[-1]
  for part in ('error: checkpoint', 'File too large', f'from step {BEFORE}'):
    assert part in line
  assert 'Traceback' not in err
  assert saved_step.named_steps(str(workdir / 'checkpoints')) == [2, BEFORE]
  assert runs.call('train.py', flags) == 0
  assert runs.timeless_rows(workdir) == runs.timeless_rows(straight)
  assert digests_of(workdir, STEPS) == digests_of(straight, STEPS)
