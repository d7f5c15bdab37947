"""Checkpoints: what is kept, restored and refused."""

import gc
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.errors import RetryableError, UserError
from moe_jax.training import saved_step, saving
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.run_dir import RunDir
from moe_jax.training.saved_step import DamagedError
from tests.helpers import runs
from tests.helpers.marks import fast_only


def make(**values: object) -> ConfigDict:
  """The base config, every step due, with keys changed: `moe__top_k=2`."""
  config = config_lib.get_config()
  config.checkpoint.every = 1
  config.update_from_flattened_dict(
    {key.replace('__', '.'): value for key, value in values.items()}
  )
  return config


def make_mesh(*shape: int) -> jax.sharding.Mesh:
  names = ('a', 'b')[: len(shape)]
  return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def place(state: dict, mesh: jax.sharding.Mesh, *spec: str | None) -> dict:
  """`state` with its matrices split over `mesh` by `spec`."""
  return jax.tree.map(
    lambda leaf: jax.device_put(
      leaf,
      NamedSharding(mesh, PartitionSpec(*spec if leaf.ndim == 2 else ())),
    ),
    state,
  )


def make_state(step: int = 0, rows: int = 8) -> dict:
  params = {'layers': {'w': jnp.arange(rows * 4.0).reshape(rows, 4) + step}}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  state = {
    'step': jnp.asarray(step, jnp.int32),
    'params': params,
    'opt_state': tx.init(params),
    'key': jax.random.key_data(jax.random.key(7)),
  }
  return place(state, make_mesh(8), 'a')


def abstract(state: dict) -> dict:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def test_restores_everything_onto_another_mesh(tmp_path: Path) -> None:
  state = make_state(step=3)
  with runs.claimed(make(), tmp_path) as store:
    assert store.latest() is None
    assert store.save(3, state)
  other = place(make_state(), make_mesh(2, 4), 'b', 'a')
  with runs.opened(make(), tmp_path) as store:
    restored = store.restore(abstract(other)).state
    assert store.latest() == 3
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  jax.tree.map(
    lambda got, wanted: (
      pytest.fail('elsewhere') if got.sharding != wanted.sharding else None
    ),
    restored,
    other,
  )
  saved = json.loads((tmp_path / 'checkpoints/3/config/metadata').read_text())
  assert saved == make().to_dict()


def test_a_part_of_the_state_is_enough(tmp_path: Path) -> None:
  with runs.claimed(make(), tmp_path) as store:
    store.save(1, make_state(1))
    params = {'params': abstract(make_state())['params']}
    restored = store.restore(params).state
  assert list(restored) == ['params']
  assert restored['params']['layers']['w'][0, 0] == 1


def test_keeps_the_newest_and_every_mth(tmp_path: Path) -> None:
  config = make(checkpoint__keep=2, checkpoint__keep_every=4)
  with runs.claimed(config, tmp_path) as store:
    for step in range(1, 8):
      store.save(step, make_state(step))
    store.wait()
    assert store.steps() == [4, 6, 7]
    restored = store.restore(abstract(make_state()), step=6).state
  assert restored['step'] == 6


def test_never_saves_a_step_twice(tmp_path: Path) -> None:
  with runs.claimed(make(), tmp_path) as store:
    saved = [store.save(step, make_state()) for step in (10, 11, 11)]
    assert saved == [True, True, False]
    assert store.steps() == [10, 11]


def test_arrays_may_be_donated_while_they_are_saved(tmp_path: Path) -> None:
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  w = jnp.ones((1000, 1000))
  with runs.claimed(make(), tmp_path) as store:
    store.save(1, {'w': w})
    overwritten = overwrite(w)
    restored = store.restore(abstract({'w': overwritten})).state
  assert (restored['w'] == 1).all() and (overwritten == -1).all()


def test_a_save_cut_short_leaves_the_one_before(tmp_path: Path) -> None:
  with runs.claimed(make(), tmp_path) as store:
    store.save(1, make_state(1))
  # What a crash leaves: a directory of that name, with half of its files.
  checkpoints = tmp_path / 'checkpoints'
  shutil.copytree(checkpoints / '1', checkpoints / '2.orbax-checkpoint-tmp')
  shutil.rmtree(checkpoints / '2.orbax-checkpoint-tmp' / 'state')
  with runs.claimed(make(), tmp_path) as store:
    assert store.latest() == 1
    assert store.restore(abstract(make_state())).step == 1
    store.save(2, make_state(2))
  assert sorted(os.listdir(checkpoints)) == ['1', '2']


def test_nothing_is_left_running(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Orbax looks for cut saves in a thread, which a slow disk holds up."""
  with runs.claimed(make(), tmp_path):
    pass
  kind = type(epath.Path(tmp_path))
  looks, exists = [], kind.exists

  def slow(path: epath.Path) -> bool:
    looks.append('begun')
    if threading.current_thread() is not threading.main_thread():
      time.sleep(0.5)
    looks.append('ended')
    return exists(path)

  monkeypatch.setattr(kind, 'exists', slow)
  with runs.claimed(make(), tmp_path):
    pass
  assert looks and looks.count('begun') == looks.count('ended')


def test_a_thread_that_is_about_to_start_is_waited_for() -> None:
  ended: list[bool] = []

  def work() -> None:
    time.sleep(0.1)
    ended.append(True)

  thread = threading.Thread(target=work)
  starter = threading.Timer(0.1, thread.start)
  starter.start()
  saving._join(thread)
  assert ended


def test_reads_that_were_given_up_tell_the_user_nothing(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  told: list[BaseException] = []
  monkeypatch.setattr(
    sys, 'excepthook', lambda _, error, __: told.append(error)
  )
  saved_step._silence_reads_in_flight.__wrapped__()
  other = RuntimeError('another')
  for error in (RuntimeError('Event loop is closed'), other):
    sys.excepthook(RuntimeError, error, None)
  assert told == [other]


def make_real_state(step: int) -> dict:
  """A state with an array that is not stored in the files of metadata."""
  state = make_state(step)
  key = jax.random.key(step)
  state['params']['layers']['big'] = jax.random.normal(key, (250, 400))
  return place(state, make_mesh(8))


def _largest(folder: Path) -> Path:
  files = [path for path in folder.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def _flip(path: Path, share: float = 0.5) -> None:
  content = bytearray(path.read_bytes())
  content[int(share * len(content))] ^= 4
  path.write_bytes(content)


def _edit(path: Path, **entries: object) -> None:
  """Changes entries of a JSON object, as if it had been saved so."""
  item = json.loads(path.read_text()) | entries
  del item['checksum']
  path.write_text(json.dumps(item | {'checksum': saved_step._checksum(item)}))


def _swap(one: Path, other: Path) -> None:
  aside = one.with_suffix('.aside')
  one.rename(aside)
  other.rename(one)
  aside.rename(other)


# What is done to a checkpoint of step 2, and what the error says of it.
DAMAGES = {
  'flip': (
    lambda at: _flip(_largest(at / 'state')),
    'array params.layers.big is not what was saved',
  ),
  'cut': (
    lambda at: os.truncate(_largest(at / 'state'), 200_000),
    'array params.layers.big',
  ),
  'empty': (
    lambda at: os.truncate(_largest(at / 'state'), 0),
    'array params.layers.big',
  ),
  'garbled': (
    lambda at: _largest(at / 'state').write_bytes(b'garbage' * 99),
    'array params.layers.big',
  ),
  'deleted': (
    lambda at: _largest(at / 'state').unlink(),
    'array params.layers.big',
  ),
  'pipe': (lambda at: os.mkfifo(at / 'state/pipe'), 'pipe is no regular file'),
  'device': (
    lambda at: (at / 'state/zero').symlink_to('/dev/zero'),
    'zero is no regular file',
  ),
  'no arrays': (lambda at: shutil.rmtree(at / 'state/d'), '2/state/d/'),
  'no state': (lambda at: shutil.rmtree(at / 'state'), 'state'),
  'no description': (lambda at: (at / 'state/_METADATA').unlink(), 'state'),
  'list': (lambda at: (at / 'state/_METADATA').write_text('[]'), 'state'),
  'not JSON': (lambda at: (at / 'data/metadata').write_text('{bad'), 'data'),
  'no object': (lambda at: (at / 'data/metadata').write_text('[1]'), 'data'),
  'no position': (lambda at: shutil.rmtree(at / 'data'), 'data'),
  'flip in JSON': (
    lambda at: _flip(at / 'data/metadata', 0.6),
    'data',
  ),
  'other step': (
    lambda at: _edit(at / 'data/metadata', step=1),
    'data/metadata is of step 1',
  ),
  'other position': (
    lambda at: _edit(at / 'data/metadata', position=1),
    'position 1, and 2 steps that skipped 0 batches come to 2',
  ),
  'state of step 1': (
    lambda at: _swap(at / 'state', at.parent / '1/state'),
    'its state is of step 1',
  ),
  'unfinished': (
    lambda at: (at / 'commit_success.txt').unlink(),
    'saving it was not finished',
  ),
  'unfinished item': (
    lambda at: (at / 'state/commit_success.txt').unlink(),
    'state/commit_success.txt is missing',
  ),
}


@pytest.mark.parametrize(
  'damage',
  fast_only(['flip', 'cut', 'no position', 'unfinished item'], DAMAGES),
)
def test_a_damaged_checkpoint_is_one_line(
  tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
  with runs.claimed(make(), tmp_path) as store:
    for step in (1, 2):
      store.save(step, make_real_state(step))
  shutil.copytree(tmp_path / 'checkpoints/1', tmp_path / 'kept')
  apply, told = DAMAGES[damage]
  apply(tmp_path / 'checkpoints/2')
  shutil.rmtree(tmp_path / 'checkpoints/1')
  (tmp_path / 'kept').rename(tmp_path / 'checkpoints/1')
  target = abstract(make_real_state(0))
  with runs.claimed(make(), tmp_path) as store:
    with pytest.raises(UserError) as error:
      store.restore(target)
    assert store.restore(target, 1).step == 1
  for part in (f'{tmp_path}/checkpoints/2 is damaged', told, '--step=1'):
    assert part in str(error.value)
  assert 'step 1, which --config.checkpoint.fallback=on' in str(error.value)
  assert '\n' not in str(error.value) and len(str(error.value)) < 900
  gc.collect()
  assert capfd.readouterr().err == ''


def test_a_part_is_held_to_its_digests(tmp_path: Path) -> None:
  with runs.claimed(make(), tmp_path) as store:
    store.save(2, make_real_state(2))
  _flip(_largest(tmp_path / 'checkpoints/2/state'))
  params = {'params': abstract(make_real_state(0))['params']}
  rest = abstract(make_real_state(0)) | params
  rest['params'] = {'layers': {'w': rest['params']['layers']['w']}}
  with runs.opened(make(), tmp_path) as store:
    with pytest.raises(DamagedError, match=r'params.layers.big.*none before'):
      store.restore(params)
    with pytest.raises(UserError, match=r'big is float32 .* and missing by'):
      store.restore(rest)
    assert store.restore({'key': rest['key']}).position == 2


def test_a_copy_under_another_name_is_told(tmp_path: Path) -> None:
  with runs.claimed(make(), tmp_path) as store:
    store.save(2, make_state(2))
  checkpoints = tmp_path / 'checkpoints'
  shutil.copytree(checkpoints / '2', checkpoints / '5')
  with (
    runs.claimed(make(checkpoint__fallback='off'), tmp_path) as store,
    pytest.raises(DamagedError, match='/5 is damaged: data/metadata is of st'),
  ):
    store.resume(abstract(make_state()))


def test_older_checkpoints_say_less_and_are_read(tmp_path: Path) -> None:
  with runs.claimed(make(), tmp_path) as store:
    store.save(2, make_state(2))
  checkpoints = tmp_path / 'checkpoints'
  (checkpoints / '2/data/metadata').write_text('{}')
  for marker in (checkpoints / '2').rglob('commit_success.txt'):
    marker.unlink()
  with runs.claimed(make(), tmp_path) as store:
    restored = store.resume(abstract(make_state()))
    assert (restored.step, restored.position) == (2, 2)
    assert restored.skipped == ()
  (checkpoints / '2').rename(checkpoints / '5')
  with (
    runs.claimed(make(), tmp_path) as store,
    pytest.raises(DamagedError, match='5 is damaged: its state is of step 2'),
  ):
    store.resume(abstract(make_state()))


def test_what_was_skipped_comes_back(tmp_path: Path) -> None:
  with runs.claimed(make(), tmp_path) as store:
    store.save(3, make_state(3), 8, [(2, 5), (20, 1)])
  with runs.claimed(make(), tmp_path) as store:
    restored = store.resume(abstract(make_state()))
  assert (restored.step, restored.position) == (3, 8)
  assert restored.skipped == ((2, 5), (20, 1))


def test_falls_back_and_sets_aside(
  tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  config = make(checkpoint__fallback='on')
  checkpoints = tmp_path / 'checkpoints'
  with runs.claimed(config, tmp_path) as store:
    for step in (1, 2, 3):
      store.save(step, make_state(step))
  (checkpoints / '2/data/metadata').write_text('[]')
  before = runs.snapshot(checkpoints / '2')
  shutil.rmtree(checkpoints / '3')
  (checkpoints / '3').symlink_to('nowhere')
  (checkpoints / 'notes').mkdir()
  (checkpoints / '0004').write_text('')
  aside = tmp_path / 'checkpoints-damaged'
  (aside / '2').mkdir(parents=True)
  with runs.claimed(config, tmp_path) as store:
    restored = store.resume(abstract(make_state()))
    assert restored.step == restored.state['step'] == 1
    assert store.steps() == [1]
    for step in (2, 3):
      store.save(step, make_state(step))
  assert runs.snapshot(aside / '2-2') == before
  assert (aside / '3').is_symlink() and not os.listdir(aside / '2')
  first, second = capsys.readouterr().err.splitlines()
  assert '3 is damaged: it is a symbolic link to nothing; it is set' in first
  assert 'no JSON object; it is set aside as' in second
  assert second.endswith('2-2, and the run goes on from step 1')
  with runs.claimed(config, tmp_path) as store:
    assert store.steps() == [1, 2, 3]


def test_nothing_is_set_aside_where_nothing_is_sound(tmp_path: Path) -> None:
  config = make(checkpoint__fallback='on')
  with runs.claimed(config, tmp_path) as store:
    store.save(1, make_state(1))
  (tmp_path / 'checkpoints/1/data/metadata').write_text('[]')
  with (
    runs.claimed(config, tmp_path) as store,
    pytest.raises(UserError, match='no other checkpoint .* another --workdir'),
  ):
    store.resume(abstract(make_state()))
  assert sorted(os.listdir(tmp_path)) == ['checkpoints', 'config.json']


@pytest.mark.parametrize(
  ('chosen', 'terminal', 'falls'),
  [
    ('on', True, True),
    ('off', False, False),
    ('auto', True, False),
    ('auto', False, True),
  ],
)
def test_a_person_is_asked(
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  chosen: str,
  terminal: bool,
  falls: bool,
) -> None:
  for stream in (sys.stdin, sys.stdout):
    monkeypatch.setattr(stream, 'isatty', lambda: terminal, raising=False)
  with runs.claimed(make(checkpoint__fallback=chosen), tmp_path) as store:
    assert store._falls_back() is falls
  monkeypatch.setattr(sys, 'stdin', None)  # as daemons have it
  with runs.claimed(make(), tmp_path) as store:
    assert store._falls_back()


DATA = {'name': 'texts/1', 'documents': 60, 'tokens': 38123, 'content': 'ab'}


def test_other_data_are_refused_unless_allowed(tmp_path: Path) -> None:
  def open_with(**changes: object) -> Checkpointer:
    config = make(data__changed=changes.pop('allowed', 'refuse'))
    run = RunDir.new_or_resumed(str(tmp_path), config)
    run.claim()
    return Checkpointer(run, None, DATA | changes if changes else None)

  with open_with(documents=60) as store:
    store.save(1, make_state(1))
  # A folder that was moved has another name and the same texts.
  for same in ({'name': 'texts/2'}, {}):
    open_with(**same).__exit__(None)
  more = {'name': 'texts/3', 'documents': 61, 'tokens': 40000}
  with pytest.raises(UserError) as error:
    open_with(**more)
  for part in (
    'texts/1 -> texts/3 (documents 60 -> 61, tokens 38123 -> 40000)',
    '--config.data.changed=allow',
  ):
    assert part in str(error.value)
  with open_with(allowed='allow', **more) as store:
    assert store.resume(abstract(make_state())).step == 1
    store.save(2, make_state(2))
  with open_with(**more) as store:
    assert store.latest() == 2


@pytest.fixture
def disk() -> Iterator[Callable[[int | None], None]]:
  """Sets how large a file can become, in bytes; None is any size."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)

  def limit(size: int | None) -> None:
    soft = before[0] if size is None else size
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

  yield limit
  limit(None)


def _until(happens: Callable[[], bool]) -> None:
  deadline = time.monotonic() + 60
  while not happens():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_a_failed_save_is_known_at_once_and_done_again(
  tmp_path: Path,
  disk: Callable[[int | None], None],
  capfd: pytest.CaptureFixture[str],
) -> None:
  target = abstract(make_real_state(0))
  with runs.claimed(make(checkpoint__keep=1), tmp_path) as store:
    assert not store.failed()
    store.save(1, make_real_state(1), wait=True)
    disk(100_000)
    assert store.save(2, make_real_state(2))
    _until(store.failed)
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['1']
    disk(None)
    assert store.failed()
    assert store.save(3, make_real_state(3))
    _until(lambda: not store._saver._manager.is_saving_in_progress())
    assert not store.failed() and store.steps() == [3]
    assert store.restore(target).step == 3
  assert capfd.readouterr().err == ''


def test_a_second_failure_ends_the_run(
  tmp_path: Path, disk: Callable[[int | None], None]
) -> None:
  with runs.claimed(make(), tmp_path) as store:
    store.save(1, make_real_state(1), wait=True)
    disk(100_000)
    store.save(2, make_real_state(2))
    _until(store.failed)
    store.save(3, make_real_state(3))
    with pytest.raises(RetryableError) as error:
      _until(store.failed)
    disk(None)
    for part in ('checkpoints/3', 'File too large', 'goes on from step 1'):
      assert part in str(error.value)
  with runs.claimed(make(), tmp_path) as store:
    assert store.resume(abstract(make_real_state(0))).step == 1


def test_the_last_save_is_waited_for_and_tried_twice(
  tmp_path: Path, disk: Callable[[int | None], None]
) -> None:
  with (
    runs.claimed(make(), tmp_path) as store,
    pytest.raises(RetryableError, match='begins anew'),
  ):
    disk(100_000)
    store.save(2, make_real_state(2), wait=True)


def test_a_save_that_fails_as_the_run_ends_is_told(
  tmp_path: Path, disk: Callable[[int | None], None]
) -> None:
  with (
    pytest.raises(RetryableError, match='File too large'),
    runs.claimed(make(), tmp_path) as store,
  ):
    disk(100_000)
    store.save(2, make_real_state(2))
  with (
    pytest.raises(KeyError),
    runs.claimed(make(), tmp_path) as store,
  ):
    store.save(2, make_real_state(2))
    raise KeyError


def test_names_the_steps_there_are(tmp_path: Path) -> None:
  target = abstract(make_state())
  with runs.claimed(make(), tmp_path) as store:
    with pytest.raises(UserError, match='no checkpoint yet'):
      store.restore(target)
    for step in (1, 2):
      store.save(step, make_state(step))
    with pytest.raises(UserError, match='checkpoint of step 5; there are 1, 2'):
      store.restore(target, step=5)


def test_refuses_another_model_naming_the_leaf(tmp_path: Path) -> None:
  with runs.claimed(make(), tmp_path) as store:
    store.save(1, make_state())
    with pytest.raises(UserError) as error:
      store.restore(abstract(make_state(rows=16)))
    for fragment in ('another model', 'layers.w', '[8, 4]', '[16, 4]'):
      assert fragment in str(error.value)
    target = abstract(make_state())
    target['params']['new'] = target['step']
    with pytest.raises(UserError, match=r'params.new is missing in the ch'):
      store.restore(target)
    del target['params']['new'], target['params']['layers']
    with pytest.raises(UserError, match=r'and missing by this config'):
      store.restore(target)


def test_refuses_a_changed_config_and_leaves_the_old(tmp_path: Path) -> None:
  with runs.claimed(make(), tmp_path):
    pass
  before = (tmp_path / 'config.json').read_text()
  with (
    pytest.raises(UserError) as error,
    runs.claimed(make(moe__top_k=1), tmp_path),
  ):
    pytest.fail('was opened')
  for fragment in ('moe.top_k was 2, now 1', str(tmp_path), '--workdir'):
    assert fragment in str(error.value)
  assert (tmp_path / 'config.json').read_text() == before
  with runs.claimed(make(train__log_every=3), tmp_path):
    pass
  assert (
    json.loads((tmp_path / 'config.json').read_text())['train']['log_every']
    == 3
  )


def test_the_vocabulary_is_kept_as_it_always_was(tmp_path: Path) -> None:
  with runs.claimed(make(), tmp_path, 'abc') as store:
    assert store.vocabulary() is None
    store.save(1, {'w': jnp.ones(2)})
    store.wait()
    assert store.vocabulary() == 'abc'
  path = tmp_path / 'checkpoints/1/data/metadata'
  assert json.loads(path.read_text())['dictionary'] == 'abc'


def test_a_checkpoint_with_a_data_position_is_read(tmp_path: Path) -> None:
  """As older runs have it beside the vocabulary's fingerprint."""
  with runs.claimed(make(), tmp_path, 'abc') as store:
    store.save(1, {'w': jnp.ones(2)})
  path = tmp_path / 'checkpoints/1/data/metadata'
  path.write_text(json.dumps({'step': 1, 'dictionary': 'abc'}))
  with runs.claimed(make(), tmp_path, 'abc') as store:
    assert store.latest() == 1
    store.restore(abstract({'w': jnp.ones(2)}))


@pytest.mark.parametrize('read_only', [True, False])
@pytest.mark.parametrize(
  ('saved', 'message'),
  [('abc', 'are of another vocabulary'), (None, 'do not say which vocabulary')],
)
def test_refuses_another_vocabulary_and_leaves_the_old_config(
  tmp_path: Path, saved: str | None, message: str, read_only: bool
) -> None:
  words = {'data__tokenizer': 'words'}
  with runs.claimed(make(**words), tmp_path, saved) as store:
    store.save(1, {'w': jnp.ones(2)})
  before = (tmp_path / 'config.json').read_text()
  moved = make(**words, data__path='/elsewhere')
  with (
    pytest.raises(UserError, match=message) as error,
    (runs.opened if read_only else runs.claimed)(moved, tmp_path, 'xyz'),
  ):
    pytest.fail('was opened')
  for part in (str(tmp_path), "data.tokenizer = 'words'", 'data.text_key'):
    assert part in str(error.value)
  assert '\n' not in str(error.value)
  assert (tmp_path / 'config.json').read_text() == before
  for accepted in (None, saved):
    with runs.claimed(moved, tmp_path, accepted) as store:
      assert store.latest() == 1


def test_evaluation_needs_a_run_of_its_model(tmp_path: Path) -> None:
  def evaluate(config: ConfigDict) -> None:
    with runs.opened(config, tmp_path) as store:
      assert store.latest() is None
      store.restore({})

  with pytest.raises(UserError, match='holds no run'):
    evaluate(make())
  assert not os.listdir(tmp_path)
  with runs.claimed(make(), tmp_path):
    pass
  with pytest.raises(UserError, match='moe.top_k was 2, now 1'):
    evaluate(make(moe__top_k=1))
  with pytest.raises(UserError, match='no checkpoint yet'):
    evaluate(make(seed=1, train__batch_size=3))
  assert sorted(os.listdir(tmp_path)) == ['checkpoints', 'config.json']


def test_workdirs_that_cannot_be_used(tmp_path: Path) -> None:
  file = tmp_path / 'file'
  file.write_text('')
  for path, fragment in (
    (str(file), 'Not a directory'),
    (str(file / 'inside'), 'Not a directory'),
    ('/proc/moe_jax/run', 'cannot be written'),  # not even for root
    ('gs://bucket/run', 'is a URL'),
    (str(tmp_path / 'a[1]' / 'run'), 'choose another workdir'),
    (str(tmp_path / 'a*'), 'choose another workdir'),
    (str(tmp_path / 'a?'), 'choose another workdir'),
  ):
    with pytest.raises(UserError, match=fragment) as error:
      RunDir.new_or_resumed(path, make())
    assert path in str(error.value)
  assert os.listdir(tmp_path) == ['file']
  broken = tmp_path / 'broken'
  broken.mkdir()
  (broken / 'config.json').write_text('{"seed"')
  with pytest.raises(UserError, match='not the JSON of a config'):
    RunDir.new_or_resumed(str(broken), make())


@pytest.mark.parametrize('name', ['checkpoints', 'tensorboard'])
def test_a_file_in_the_place_of_a_folder(tmp_path: Path, name: str) -> None:
  (tmp_path / name).write_text('')
  with pytest.raises(UserError, match=f'{name} is no folder; move it away'):
    RunDir.new_or_resumed(str(tmp_path), make())
  (tmp_path / name).unlink()
  (tmp_path / 'metrics.jsonl').mkdir()
  with pytest.raises(UserError, match='metrics.jsonl is no file; move it away'):
    RunDir.new_or_resumed(str(tmp_path), make())
  assert os.listdir(tmp_path) == ['metrics.jsonl']


def test_a_run_that_was_moved_to_such_a_path_is_still_read(
  tmp_path: Path,
) -> None:
  """Only writing looks for files by a pattern."""
  state = make_state(1)
  with runs.claimed(make(), tmp_path / 'run') as store:
    store.save(1, state)
  moved = (tmp_path / 'run').rename(tmp_path / 'a[1]')
  with runs.opened(make(), moved) as store:
    assert store.restore(abstract(state)).step == 1


@pytest.mark.skipif(os.geteuid() == 0, reason='root writes anywhere')
def test_a_read_only_workdir(tmp_path: Path) -> None:
  tmp_path.chmod(0o500)
  with pytest.raises(UserError, match='cannot be written: Permission denied'):
    RunDir.new_or_resumed(str(tmp_path), make())
