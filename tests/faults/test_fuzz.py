"""Five hundred random mistakes: one line each, nothing written, always an end.

Every case runs the command itself, in this process, up to the point where it
would compile: the parameters of a run, or the writing of an import. It is to
get there, or to be refused with status 2 and one line. Seeds are fixed.
"""

import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import tensorflow_datasets as tfds

from moe_jax import __main__ as command
from moe_jax import config as config_lib
from moe_jax import runtime
from moe_jax.config import saved
from moe_jax.config.schema import KEYS
from moe_jax.interop import checkpoint
from moe_jax.planning import compiled
from moe_jax.training.state import Setup
from moe_jax.training.step import make_train_step
from tests.helpers import marks, tiny
from tests.helpers.released import RELEASED

pytestmark = pytest.mark.slow

# Of a case: many times what the slowest takes on a machine with nothing to do.
_SECONDS = 60

_TEXTS = (
  '', ' ', '.', '..', '../x', '/proc/no', 'x' * 5000, 'a\x1b[31mb', 'é→', '\0',
  'a:b', 'a:b:c', '~', '~nobody-x/y', 'exp[1]', 'a*', 's**t', '%s{}', '3:2',
  'train[', 'train+', 'all', 'train[:50%]', 'validation', 'train[5:]', 'True',
  'huggingface:x', 'kaggle:y/z', 'lm1b/version=2.0.0', 'text_folder/1.0', ',',
)  # fmt: skip
_INTEGERS = (
  '-1', '0', '1', '2', '3', '5', '8', '64', '2147483647', '2147483648', '1e3',
  '9223372036854775808', '1' + '0' * 400, '-7', '0x10', '1_0', '٣', '', ' 4',
)  # fmt: skip
_NUMBERS = (
  'nan', 'inf', '-inf', '1e999', '-0.0', '0', '1e-300', '0.5', '1', '1e300',
  '-1', '1e-8', '2', '', 'x', '1' * 400,
)  # fmt: skip
_VALUES = (
  None, True, False, -1, 0, 1, 2, 3, 7, 64, 2**31 - 1, 2**31, 2**63, 10**12,
  10**400, -(10**9), 0.5, -0.5, 1e300, float('nan'), float('inf'), '', 'x',
  'a\x1b[31m', [], [1], {}, {'x': 1}, [[[]]], 'F32', 'I8', '../x', '\0',
)  # fmt: skip


class _Reached(Exception):
  """A case is accepted: from here on it would compile."""


@pytest.fixture(autouse=True)
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Stops where something would be compiled, and has no network."""

  def init(setup: Setup, params: Any = None) -> None:
    batch = compiled.abstract_batch(setup)
    jax.eval_shape(make_train_step(setup), setup.abstract, batch)
    raise _Reached

  def reach(*_: Any, **__: Any) -> None:
    raise _Reached

  def download(self: object, url: str) -> None:
    raise tfds.download.DownloadError('there is no network')

  monkeypatch.setattr(Setup, 'init', init)
  monkeypatch.setattr(checkpoint, 'write_run', reach)
  monkeypatch.setattr(tfds.download.DownloadManager, 'download', download)
  # It would tune malloc for the rest of the tests too.
  monkeypatch.setenv(runtime.SWITCH, '0')
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'below' / 'here').mkdir(parents=True)
  monkeypatch.chdir(tmp_path / 'below' / 'here')


@pytest.fixture
def texts(tmp_path: Path) -> Path:
  """A small folder of texts."""
  folder = tmp_path / 'texts'
  folder.mkdir()
  for i in range(40):
    (folder / f'{i}.txt').write_text(f'the text of number {i}\n' * 10)
  return folder


@contextlib.contextmanager
def _limited() -> Iterator[None]:
  """Raises a TimeoutError in what has no end."""

  def late(*_: object) -> None:
    raise TimeoutError

  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(_SECONDS)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _outcome(arguments: list[str]) -> tuple[str, str]:
  """How a command ends: a kind, and what there is to say of it."""
  err = io.StringIO()
  sys.argv = ['moe_jax', *arguments]
  try:
    with _limited(), contextlib.redirect_stderr(err):
      command.main()
  except _Reached:
    return 'accepted', ''
  except TimeoutError:
    return 'no end', ''
  except SystemExit as stop:
    lines = err.getvalue().splitlines()
    told = len(lines) == 1 and lines[0].startswith('error: ')
    if stop.code == 2 and told and lines[0].isprintable():
      return 'one line', lines[0]
    return f'status {stop.code}', err.getvalue()[-2000:]
  except BaseException:
    return 'traceback', traceback.format_exc()[-2000:]
  return 'no status', ''


def _measure(
  name: str,
  cases: Iterator[tuple[list[str], Path]],
  capsys: pytest.CaptureFixture[str],
) -> None:
  """Runs cases, each with the folder that a refusal is not to make."""
  kinds: collections.Counter[str] = collections.Counter()
  bad, slowest = [], 0.0
  began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
  for arguments, target in cases:
    start = time.perf_counter()
    kind, said = _outcome(arguments)
    slowest = max(slowest, time.perf_counter() - start)
    if kind == 'one line' and (target.exists() or _left(target)):
      kind = 'partial write'
    kinds[kind] += 1
    if kind not in ('one line', 'accepted'):
      shown = [argument[:200] for argument in arguments]
      bad.append(f'{kind}: {shown}\n{said}')
    shutil.rmtree(target, ignore_errors=True)
  now = resource.getrusage(resource.RUSAGE_SELF)
  cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
  counted = ', '.join(f'{count} {kind}' for kind, count in kinds.items())
  with capsys.disabled():
    print(
      f'\nfuzz {name}: {sum(kinds.values())} cases: {counted}; slowest'
      f' {slowest:.1f} s, {cpu:.0f} CPU s, {time.perf_counter() - began:.0f} s'
    )
  assert not bad, '\n\n'.join(bad[:5])


def _left(target: Path) -> list[Path]:
  """What an import leaves beside its target while it is not whole."""
  return list(target.parent.glob(f'.{target.name}.*'))


def _tiny(texts: Path) -> list[str]:
  """The command line of a small run on these texts."""
  made = tiny.config(
    **{
      'model.num_layers': 1,
      'eval.every': 0,
      'data.name': 'text_folder',
      'data.path': str(texts),
      'data.dir': str(texts.parent / 'prepared'),
    }
  )
  old = config_lib.flatten(config_lib.get_config().to_dict())
  new = config_lib.flatten(made.to_dict())
  changed = [f'--config.{k}={v}' for k, v in new.items() if v != old[k]]
  return ['train', '--config=base', *changed]


def _odd_text(rng: random.Random, name: str) -> str:
  """What a key may be set to, right or not."""
  key = KEYS[name]
  if isinstance(key.default, bool):
    return rng.choice(('True', 'no', '2', '', 'x'))
  if isinstance(key.default, str):
    return rng.choice((*key.names(), *rng.sample(_TEXTS, 8)))
  return rng.choice(_INTEGERS if isinstance(key.default, int) else _NUMBERS)


@pytest.mark.parametrize('count', marks.at_first(1, (40, 170)))
def test_overrides(
  count: int, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  def cases() -> Iterator[tuple[list[str], Path]]:
    rng = random.Random(1)
    workdir = texts.parent / 'run'
    for _ in range(count):
      names = rng.sample(list(KEYS), rng.randint(1, 3))
      odd = [f'--config.{name}={_odd_text(rng, name)}' for name in names]
      yield [*_tiny(texts), f'--workdir={workdir}', *odd], workdir

  _measure('overrides, seed 1', cases(), capsys)


_STATEMENTS = (
  'c.model.num_layers = 2', 'c.seed = None', 'c.seed = 1.5', 'c.model = 3',
  'c.nothing = 1', 'c.model.nothing = 1', 'del c.model', 'c.moe.top_k = "2"',
  'c.data.seq_len = 2**70', 'return 3', 'return None', 'return {}', '1 / 0',
  'import nowhere_at_all', 'raise ValueError("a\\x1b[31m\\nb")', 'f = lambda',
  'assert False', '[][1]', '{}["k"]', 'open("/proc/no")', 'c.lock().new = 1',
  'get_config()', '"x" + 1', 'c = c.to_dict()', 'c.router.score = "cosin"',
  'from moe_jax.registry import GATES; GATES.register("linear")(None)',
  'c.optimizer.b1 = float("nan")', 'c.data.path = "~nobody-x/y"', '  x = 1',
  'raise RecursionError', 'raise MemoryError', 'c.train.steps = True',
)  # fmt: skip


def _program(rng: random.Random) -> bytes:
  """A config file in Python, right or not."""
  lines = [
    'from moe_jax import config',
    'def get_config():',
    '  c = config.get_config()',
    *(f'  {rng.choice(_STATEMENTS)}' for _ in range(rng.randint(1, 3))),
    '  return c',
  ]
  if rng.random() < 0.2:
    del lines[rng.randrange(len(lines))]
  text = '\n'.join(lines).encode()
  return _flipped(rng, text) if rng.random() < 0.2 else text


def _saved(rng: random.Random) -> bytes:
  """A config.json, right or not."""
  values = json.loads(saved.to_json(config_lib.get_config()))
  if rng.random() < 0.7:
    return json.dumps(_mutated(rng, values)).encode()
  text = json.dumps(values).encode()
  return rng.choice(
    (
      _flipped(rng, text),
      text[: rng.randrange(len(text))],
      b'[' * 200_000,
      b'{"a":' * 3000,
      b'\xef\xbb\xbf' + text,
      b'{"model": ' * 150 + b'1' + b'}' * 150,
      b'[1]',
      b'"x"',
    )
  )


def _flipped(rng: random.Random, content: bytes, most: int = 4) -> bytes:
  changed = bytearray(content)
  for _ in range(rng.randint(1, most)):
    changed[rng.randrange(len(changed))] = rng.randrange(256)
  return bytes(changed)


def _mutated(rng: random.Random, value: Any) -> Any:
  """A copy of nested values, one or two of which are changed."""
  copy = json.loads(json.dumps(value))
  for _ in range(rng.randint(1, 2)):
    part = copy
    while True:
      keys = list(part) if isinstance(part, dict) else range(len(part))
      if not keys:
        break
      key = rng.choice(keys)
      if isinstance(part[key], dict | list) and rng.random() < 0.8:
        part = part[key]
        continue
      if rng.random() < 0.2 and isinstance(part, dict):
        del part[key]
      elif rng.random() < 0.1 and isinstance(part, dict):
        part['x\x1b'] = rng.choice(_VALUES)
      else:
        part[key] = rng.choice(_VALUES)
      break
  return copy


@pytest.mark.parametrize('count', marks.at_first(1, (25, 110)))
def test_config_files(
  count: int, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  def cases() -> Iterator[tuple[list[str], Path]]:
    rng = random.Random(2)
    workdir = texts.parent / 'run'
    for i in range(count):
      kind = rng.choice(('py', 'json'))
      # Of a name of its own: a module is loaded once.
      path = texts.parent / f'config_{i}.{kind}'
      path.write_bytes(_program(rng) if kind == 'py' else _saved(rng))
      arguments = [*_tiny(texts), f'--workdir={workdir}']
      arguments[1] = f'--config={path}' + rng.choice(('', '', '', ':x', ':'))
      yield arguments, workdir

  _measure('config files, seed 2', cases(), capsys)


def _corpus(rng: random.Random, folder: Path) -> None:
  """A folder of texts that may be none."""
  names = ('a', 'b.txt', '.hidden', 'ü→', 'new\nline', 'x' * 200, '-n', 'c d')
  for i in range(rng.randint(0, 6)):
    path = folder / rng.choice(('', 'sub', '.git')) / f'{rng.choice(names)}{i}'
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = rng.randrange(8)
    if kind == 0:
      path.symlink_to(rng.choice(('..', '.', 'nowhere', '/dev/zero')))
    elif kind == 1:
      os.mkfifo(path)
    elif kind == 2:
      path.write_bytes(rng.randbytes(rng.randint(0, 300)))
    else:
      text = rng.choice(('', 'text ', 'é→\r\n', '\ufeff', 'line\n', '\0'))
      code = rng.choice(('utf-8', 'utf-8', 'utf-8-sig', 'utf-16'))
      path.write_bytes((text * rng.choice((1, 50, 20_000))).encode(code))


def _archive(rng: random.Random, path: Path, name: str) -> None:
  """A zip that may be none."""
  ours = ('enwik8',) if name == 'enwik8' else ('wiki.train.tokens',)
  kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)
  with zipfile.ZipFile(path, 'w', rng.choice((*kinds, zipfile.ZIP_BZIP2))) as f:
    for member in (*ours, 'wiki.valid.tokens', 'wiki.test.tokens'):
      count = rng.choice((9, 999))
      text = ' '.join(str(rng.randrange(99)) for _ in range(count))
      f.writestr(member, text + '\n')
      if rng.random() < 0.05:
        f.writestr(f'__MACOSX/{member}', '')
  content = path.read_bytes()
  kind = rng.randrange(6)
  if kind == 0:
    path.write_bytes(content[: rng.randrange(len(content))])
  elif kind == 1:
    place = rng.randrange(len(content))
    path.write_bytes(content[:place] + rng.randbytes(9) + content[place:])
  elif kind < 5:
    path.write_bytes(_flipped(rng, content, 12))


@pytest.mark.parametrize('count', marks.at_first(1, (20, 90)))
def test_corpora(
  count: int, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  def cases() -> Iterator[tuple[list[str], Path]]:
    rng = random.Random(3)
    workdir = texts.parent / 'run'
    for i in range(count):
      name = rng.choice(('text_folder', 'text_folder', 'enwik8', 'wikitext103'))
      path = texts.parent / f'corpus_{i}'
      if name == 'text_folder':
        path.mkdir()
        _corpus(rng, path)
      else:
        _archive(rng, path, name)
      keys = {
        'data.name': name,
        'data.path': path,
        'data.tokenizer': rng.choice(('bytes', 'words', 'enwik8')),
        'data.train_split': rng.choice(('train', 'train', 'all', 'test[:1]')),
        'data.order': rng.choice(('shuffled', 'packed', 'contiguous')),
        'eval.every': rng.choice((0, 1)),
      }
      odd = [f'--config.{key}={value}' for key, value in keys.items()]
      yield [*_tiny(texts), f'--workdir={workdir}', *odd], workdir

  _measure('corpora, seed 3', cases(), capsys)


def _damage_tensors(rng: random.Random, path: Path) -> None:
  """Changes a safetensors file, most often in its header."""
  content = path.read_bytes()
  size = int.from_bytes(content[:8], 'little')
  kind = rng.randrange(6)
  if kind < 3:
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(_mutated(rng, header)).encode()
    text += b' ' * (-len(text) % 8)
    content = len(text).to_bytes(8, 'little') + text + content[8 + size :]
  elif kind == 3:
    length = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, size - 8, size + 8))
    content = length.to_bytes(8, 'little') + content[8:]
  elif kind == 4:
    content = content[: rng.choice((0, 7, 100, rng.randrange(len(content))))]
  else:
    content = _flipped(rng, content[: 8 + size], 8) + content[8 + size :]
  path.write_bytes(content)


def _damage_release(rng: random.Random, folder: Path) -> None:
  """Changes one of the files of a released checkpoint."""
  path, config = folder / 'model.safetensors', folder / 'config.json'
  kind = rng.randrange(10)
  if kind < 5:
    values = json.loads(config.read_text())
    config.write_text(json.dumps(_mutated(rng, values)))
  elif kind == 5:
    config.write_bytes(_flipped(rng, config.read_bytes()))
  elif kind == 6:
    names = [f'tensor.{i}' for i in range(9)]
    file = rng.choice(('shard', '', '..', 'config.json'))
    places = dict.fromkeys(names, file)
    path.rename(folder / 'shard')
    index = _mutated(rng, {'metadata': {}, 'weight_map': places})
    text = json.dumps(index) if rng.random() < 0.8 else '{"weight_map":' * 3000
    path.with_name('model.safetensors.index.json').write_text(text)
  else:
    _damage_tensors(rng, path)


@pytest.mark.parametrize('count', marks.at_first(1, (30, 130)))
def test_released_checkpoints(
  count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  def cases() -> Iterator[tuple[list[str], Path]]:
    rng = random.Random(4)
    for i in range(count):
      folder, target = tmp_path / f'release_{i}', tmp_path / 'out' / 'run'
      shutil.copytree(RELEASED / rng.choice(('rmoe_gru', 'cartesian')), folder)
      (folder / 'reference.npz').unlink()
      _damage_release(rng, folder)
      yield ['convert', 'import', str(folder), str(target)], target
      shutil.rmtree(folder)

  _measure('released checkpoints, seed 4', cases(), capsys)
