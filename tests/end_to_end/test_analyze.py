"""`moe_jax analyze` on runs, against the oracle token by token."""

import math
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from moe_jax import __main__ as command
from moe_jax import analysis, runtime
from moe_jax.analysis import analyze as analyze_lib
from moe_jax.analysis import figures
from moe_jax.analysis.analyze import analyze
from moe_jax.config import saved
from moe_jax.data import folders
from moe_jax.errors import UserError
from moe_jax.model.decoder import Decoder
from moe_jax.training import loop
from tests.helpers import oracle, oracle_span, runs, tiny

EOS = 256
STEPS = [2, 4]
NAMES = ['2A', '2B', '3A', '3B']
W, N, K, L = 4, 8, 2, 16
LIBRARY = Path(sysconfig.get_path('stdlib'))


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """The keys of a data set of Python files."""
  folder = tmp_path_factory.mktemp('source')
  names = [f'part-{i}.py' for i in range(200)]
  for split, file in (('train', 'textwrap.py'), ('validation', 'this.py')):
    name = next(n for n in names if folders.split_of(n) == split)
    (folder / name).write_text((LIBRARY / file).read_text())
  return {
    'data.name': 'text_folder',
    'data.path': str(folder),
    'data.dir': str(tmp_path_factory.mktemp('prepared')),
  }


@pytest.fixture(scope='module')
def config(source: dict[str, str]) -> ConfigDict:
  """A dense layer, then Cartesian ones with a recurrent router."""
  return tiny.config(
    **{
      'model.num_layers': 3,
      'moe.first_dense': 1,
      'moe.factors': 2,
      'router.recurrent': 'gru',
      'train.steps': STEPS[-1],
      'checkpoint.every': STEPS[0],
      'optimizer.learning_rate': 0.02,
      'optimizer.warmup_steps': 1,
      'eval.every': 0,
      **source,
    }
  )


@pytest.fixture(scope='module')
def workdir(
  config: ConfigDict, tmp_path_factory: pytest.TempPathFactory
) -> Path:
  """A run with checkpoints of steps 2 and 4."""
  workdir = tmp_path_factory.mktemp('run')
  loop.train(config, str(workdir))
  return workdir


@pytest.fixture(scope='module')
def found(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """The analysis of the newest checkpoint, as it was written."""
  analyze(config, str(workdir), passage=40)
  return runs.read_json(workdir / 'analysis' / f'{STEPS[-1]}.json')


@pytest.fixture(scope='module')
def sequences(
  config: ConfigDict, workdir: Path
) -> list[tuple[np.ndarray, oracle.Sequence, np.ndarray]]:
  """The inputs of every window, the oracle that ran it, and its logits."""
  params = runs.restore(config, workdir, STEPS[-1])['params']
  stream = np.array([EOS, *(LIBRARY / 'this.py').read_bytes(), EOS])
  done = []
  for begin in range(0, len(stream) - 1, L):
    ids = stream[begin : begin + L][: len(stream) - 1 - begin]
    sequence = oracle.Sequence(config, params)
    done.append((ids, sequence, sequence.run(ids)))
  return done


@pytest.mark.slow
def test_the_file_has_what_it_promises(found: dict[str, Any]) -> None:
  def shape(value: Any) -> tuple[int, ...]:
    return np.shape(np.array(value, dtype=float))

  tokens = len((LIBRARY / 'this.py').read_bytes()) + 1
  assert found['format'] == 1 and found['step'] == STEPS[-1]
  assert found['split'] == 'validation' and found['tokens'] == tokens
  assert found['routers'] == {
    'names': NAMES,
    'layers': [2, 2, 3, 3],
    'experts': N,
    'null_experts': 0,
    'top_k': K,
    'factors': 2,
    'gate': 'linear',
    'recurrent': 'gru',
  }
  assert shape(found['mutual_information']) == (W, W)
  density = found['gate_entropy']['density']
  assert shape(density) == (W, len(found['gate_entropy']['edges']) - 1)
  for key in ('inner_balance', 'outer_balance'):
    assert shape(found[key]['median']) == (W,)
    lower, upper = np.array(found[key]['quartiles']).T
    assert (lower <= found[key]['median']).all()
    assert (upper >= found[key]['median']).all()
  for values in (
    found['selection_frequency'],
    *found['norms'].values(),
  ):
    assert shape(values) == (W, N)
  assert np.sum(found['selection_frequency'], 1) == pytest.approx([K] * W)
  for values in found['expert_similarity'].values():
    assert shape(values) == (W,)
  assert found['pairs']['names'] == ['2A x 2B', '3A x 3B']
  assert shape(found['pairs']['shares']) == (2, N, N)
  assert np.sum(found['pairs']['shares'], (1, 2)) == pytest.approx([1, 1])
  assert (
    shape(found['pairs']['live']) == shape(found['pairs']['entropy']) == (2,)
  )
  for values in found['agreement'].values():
    assert values[0] is None and shape(values) == (W,)
  for of_router in found['vocabulary']:
    assert len(of_router) == N
    for told in of_router:
      assert len(told) <= 8
      for each in told:
        assert each.keys() == {'token', 'share', 'lift'} and each['lift'] > 1
  classes = found['token_classes']
  assert classes['source'] == 'python tokenize'
  assert shape(classes['share']) == (W, N, len(classes['classes']))
  assert sum(classes['base']) == pytest.approx(1, abs=1e-5)
  along = found['checkpoints']
  assert along['steps'] == STEPS
  assert shape(along['route_stability']) == (1, W)
  for values in (along['drop_ratio'], *along['gradient_norm'].values()):
    assert shape(values) == (2, W)
  passage = found['passage']
  assert len(passage['tokens']) == len(passage['loss']) == 40
  assert passage['loss'][0] is None
  for key, size in (('experts', K), ('weights', K), ('top', 4)):
    assert shape(passage[key]) == (W, 40, size)
  assert shape(passage['top_probability']) == (W, 40, 4)


@pytest.mark.slow
def test_equals_the_oracle(found: dict[str, Any], sequences: list[Any]) -> None:
  frequency, entropy, tokens = np.zeros((W, N)), np.zeros(W), 0
  outer: list[list[float]] = [[] for _ in range(W)]
  pairs, same = np.zeros((2, N, N)), np.zeros(W)
  for ids_L, sequence, _ in sequences:
    tokens += len(ids_L)
    for w, (shares_LN, chosen) in enumerate(sequence.routed):
      np.add.at(frequency[w], np.concatenate(chosen), 1)
      entropy[w] -= (shares_LN * np.log(shares_LN)).sum()
      for shares_N, of_token in zip(shares_LN, chosen, strict=True):
        outer[w].append(sum(shares_N[n] for n in of_token))
      if w:
        below = sequence.routed[w - 1][1]
        for a, b in zip(below, chosen, strict=True):
          same[w] += len(set(a) & set(b))
          if w % 2:
            pairs[w // 2][np.ix_(a, b)] += 1
  assert found['tokens'] == tokens
  np.testing.assert_allclose(
    found['selection_frequency'], frequency / tokens, rtol=1e-5
  )
  np.testing.assert_allclose(
    found['gate_entropy']['mean'], entropy / tokens, rtol=1e-5
  )
  np.testing.assert_allclose(
    found['outer_balance']['median'], np.median(outer, 1), atol=1 / 4096
  )
  np.testing.assert_allclose(
    found['pairs']['shares'], pairs / pairs.sum((1, 2), keepdims=True), 1e-4
  )
  np.testing.assert_allclose(
    found['agreement']['below'][1:], same[1:] / tokens / K, rtol=1e-5
  )


@pytest.mark.slow
def test_the_passage_equals_the_oracle(
  found: dict[str, Any], sequences: list[Any]
) -> None:
  passage = found['passage']
  text = (LIBRARY / 'this.py').read_text()
  assert passage['tokens'] == ['<eos>', *text[:39]]
  ids = np.concatenate([ids_L for ids_L, _, _ in sequences])[:40]
  logits_TV = np.concatenate([logits for _, _, logits in sequences])[:40]
  shares_TV = oracle.softmax(logits_TV)
  np.testing.assert_allclose(
    passage['loss'][1:],
    -np.log(shares_TV[np.arange(39), ids[1:]]),
    rtol=1e-4,
  )
  for w in range(W):
    routed = [sequence.routed[w] for _, sequence, _ in sequences]
    chosen = [list(e) for _, of_window in routed for e in of_window][:40]
    assert passage['experts'][w] == chosen
    shares_TN = np.concatenate([shares_LN for shares_LN, _ in routed])[:40]
    top_TK = np.argsort(-shares_TN, axis=1)[:, :4]
    np.testing.assert_array_equal(passage['top'][w], top_TK)
    top_shares = np.take_along_axis(shares_TN, top_TK, 1)
    np.testing.assert_allclose(
      passage['top_probability'][w], top_shares, atol=6e-4
    )
    weights = top_shares[:, :K] / top_shares[:, :K].sum(1, keepdims=True)
    np.testing.assert_allclose(passage['weights'][w], weights, atol=6e-4)


@pytest.mark.slow
def test_checkpoints_equal_a_loss_of_their_own(
  config: ConfigDict, workdir: Path, found: dict[str, Any], sequences: list[Any]
) -> None:
  """Gradients of losses written out here, on one device."""
  along = found['checkpoints']
  ids, targets = stream_batch(sequences)
  mask = ids >= 0
  inputs = jnp.asarray(np.maximum(ids, 0))
  model = nnx.eval_shape(
    lambda: Decoder(config, EOS + 1, None, rngs=nnx.Rngs(params=0))
  )
  graphdef = nnx.graphdef(model)

  def terms(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    model = nnx.merge(graphdef, params)
    output = model(inputs, jnp.asarray(mask), lambda aux: aux.routing)
    logs_BLV = jax.nn.log_softmax(output.logits_BLV)
    logs_BL = jnp.take_along_axis(logs_BLV, targets[..., None], -1)[..., 0]
    shares_WTN = output.aux.probabilities_TN.reshape(W, -1, N)
    chosen_WTK = output.aux.indices_TK.reshape(W, -1, K)
    real_T1 = mask.reshape(-1, 1)
    visits_WTKN = chosen_WTK[..., None] == jnp.arange(N)
    counts_WN = (visits_WTKN * real_T1[..., None]).sum((1, 2))
    sums_WN = (shares_WTN * real_T1).sum(1)
    balance = N * (counts_WN * sums_WN).sum() / mask.sum() ** 2
    loss = -(logs_BL * mask).sum() / mask.sum()
    return jnp.stack([loss, config.loss.balance_weight * balance]), chosen_WTK

  jacobian = jax.jit(jax.jacrev(terms, has_aux=True))
  routed = {}
  for p, step in enumerate(STEPS):
    params = runs.restore(config, workdir, step)['params']
    gradients, routed[step] = jacobian(params)
    for i, name in enumerate(('cross_entropy', 'balance_loss')):
      gradient = jax.tree.map(lambda a, i=i: np.asarray(a[i]), gradients)
      wanted = [
        np.sqrt(sum((a**2).sum() for a in jax.tree.leaves(layer['router'])))
        for block in oracle.blocks(gradient)
        for layer in oracle.ordered(block['chain']['sub_layers'])
        if 'router' in layer
      ]
      measured = along['gradient_norm'][name][p]
      np.testing.assert_allclose(measured, wanted, rtol=1e-3)
  before, after = (np.asarray(routed[step]) for step in STEPS)
  real = (ids >= 0).reshape(-1)
  for w in range(W):
    kept = [
      len(set(a) & set(b)) / K
      for a, b in zip(before[w][real], after[w][real], strict=True)
    ]
    assert along['route_stability'][0][w] == pytest.approx(np.mean(kept), 1e-5)
    room = math.ceil(real.sum() * K / N)
    counts = np.bincount(after[w][real].reshape(-1), minlength=N)
    dropped = np.maximum(counts - room, 0).sum() / (real.sum() * K)
    assert along['drop_ratio'][1][w] == pytest.approx(dropped, rel=1e-5)
  assert min(along['route_stability'][0]) < 1


def stream_batch(sequences: list[Any]) -> tuple[np.ndarray, np.ndarray]:
  """All windows as one batch: ids, -1 where there is none, and targets."""
  ids = np.full((len(sequences), L), -1)
  for row, (ids_L, _, _) in zip(ids, sequences, strict=True):
    row[: len(ids_L)] = ids_L
  flat = np.append(ids[ids >= 0], EOS)
  targets = np.zeros(ids.shape, int)
  targets[ids >= 0] = flat[1:]
  return ids, targets


@pytest.mark.slow
def test_again_on_another_mesh_and_in_other_batches(
  config: ConfigDict, workdir: Path, found: dict[str, Any]
) -> None:
  before = runs.snapshot(workdir)
  analyze(config, str(workdir), passage=40)
  assert runs.snapshot(workdir) == before
  other = config.copy_and_resolve_references()
  other.mesh.data, other.mesh.expert, other.mesh.tensor = 2, 2, 2
  other.eval.batch_size = 12
  again = analyze(other, str(workdir), passage=40)
  assert again.keys() == found.keys()
  close(again, found)


def close(a: Any, b: Any, path: str = '') -> None:
  """Everything is equal, numbers within the rounding of float32."""
  if isinstance(b, dict):
    assert a.keys() == b.keys(), path
    for key in b:
      close(a[key], b[key], f'{path}.{key}')
  elif isinstance(b, list):
    assert len(a) == len(b), path
    for i, each in enumerate(b):
      close(a[i], each, f'{path}[{i}]')
  elif isinstance(b, float):
    # A probability may fall on the other side of a digit's or a bin's edge.
    assert a == pytest.approx(b, rel=5e-3, abs=5e-3), path
  else:
    assert a == b, path


@pytest.mark.slow
@pytest.mark.thorough
def test_fewer_tokens_an_older_step_and_another_split(
  config: ConfigDict, workdir: Path, sequences: list[Any]
) -> None:
  part = analyze(config, str(workdir), tokens=100, passage=0)
  assert part['tokens'] == 100
  counts = np.zeros(N)
  done = 0
  for _, sequence, _ in sequences:
    for of_token in sequence.routed[2][1]:
      if done < 100:
        np.add.at(counts, of_token, 1)
      done += 1
  np.testing.assert_allclose(
    part['selection_frequency'][2], counts / 100, rtol=1e-5
  )
  assert part['passage']['tokens'] == []
  old = analyze(config, str(workdir), step=STEPS[0], split='train', tokens=32)
  assert (old['step'], old['split'], old['tokens']) == (2, 'train', 32)


@pytest.mark.slow
def test_a_memory_is_carried(source: dict[str, str], tmp_path: Path) -> None:
  """RMoE's span of tokens, in batches and through the passage."""
  config = tiny.config(
    **{
      'model.num_layers': 2,
      'model.positions': 'span',
      'model.span': 20,
      'model.norm_place': 'post',
      'data.order': 'contiguous',
      'train.steps': 1,
      'train.batch_size': 8,
      'checkpoint.every': 1,
      'eval.every': 0,
      'eval.batch_size': 8,
      **source,
    }
  )
  loop.train(config, str(tmp_path))
  found = analyze(config, str(tmp_path), passage=50)
  params = runs.restore(config, tmp_path, 1)['params']
  stream = np.array([EOS, *(LIBRARY / 'this.py').read_bytes(), EOS])

  def through(inputs: np.ndarray) -> tuple[list[float], np.ndarray]:
    """The loss of every token, and the choices, of text read from its start."""
    losses, counts, memory = [], np.zeros((2, N)), None
    for begin in range(0, len(inputs) - 1, L):
      ids = inputs[begin : begin + L][: len(inputs) - 1 - begin]
      sequence = oracle_span.Sequence(config, params)
      shares_LV = oracle.softmax(sequence.run(ids, memory))
      memory = sequence.memory
      targets = inputs[begin + 1 :][: len(ids)]
      losses += list(-np.log(shares_LV[np.arange(len(ids)), targets]))
      for w, (_, chosen) in enumerate(sequence.routed):
        np.add.at(counts[w], np.concatenate(chosen), 1)
    return losses, counts

  losses, _ = through(stream[:51])
  np.testing.assert_allclose(found['passage']['loss'][1:], losses[:49], 1e-4)
  row = math.ceil((len(stream) - 1) / 8)
  rows = [stream[i : i + row + 1] for i in range(0, len(stream) - 1, row)]
  counts = sum(through(each)[1] for each in rows)
  np.testing.assert_allclose(
    found['selection_frequency'], counts / (len(stream) - 1), rtol=1e-4
  )


@pytest.mark.slow
def test_as_many_experts_as_it_takes(
  source: dict[str, str], tmp_path: Path
) -> None:
  """Top-p of a gate that nothing trains, as CartesianMoE's baselines."""
  config = tiny.config(
    **{
      'router.selection': 'top_p',
      'router.top_p': 0.4,
      'router.score': 'hash',
      'train.steps': 1,
      'checkpoint.every': 1,
      'eval.every': 0,
      **source,
    }
  )
  loop.train(config, str(tmp_path))
  found = analyze(config, str(tmp_path), tokens=60, passage=60)
  params = runs.restore(config, tmp_path, 1)['params']
  stream = np.array([EOS, *(LIBRARY / 'this.py').read_bytes()])[:60]
  frequency, chosen = np.zeros((2, N)), [[], []]
  for begin in range(0, 60, L):
    sequence = oracle.Sequence(config, params)
    sequence.run(stream[begin : begin + L])
    for w, (_, of_window) in enumerate(sequence.routed):
      np.add.at(frequency[w], np.concatenate(of_window), 1)
      chosen[w] += [list(of_token) for of_token in of_window]
  assert found['passage']['experts'] == chosen
  assert len({len(of_token) for of_token in chosen[0]}) > 1
  np.testing.assert_allclose(
    found['selection_frequency'], frequency / 60, rtol=1e-5
  )
  assert found['routers']['top_k'] is None
  assert found['pairs'] is None and found['norms']['router'] is None
  gradients = found['checkpoints']['gradient_norm']['cross_entropy']
  assert gradients == [[0.0, 0.0]]


def call(arguments: list[str], patch: pytest.MonkeyPatch) -> int:
  """Runs `moe_jax analyze` in this process; returns its exit status."""
  patch.setattr(sys, 'argv', ['moe_jax', 'analyze', *arguments])
  patch.setenv(runtime.SWITCH, '0')
  with pytest.raises(SystemExit) as stop:
    command.main()
  return stop.value.code


@pytest.mark.slow
def test_the_program(
  workdir: Path,
  found: dict[str, Any],
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  """Of two runs, one a copy of the other."""
  shutil.copytree(workdir, tmp_path / 'copy')
  shutil.rmtree(tmp_path / 'copy' / 'analysis')
  workdirs = [workdir, tmp_path / 'copy']
  flags = ['--passage=40', '--tokens', '5000', '--config.train.steps', '8']
  assert call([*map(str, workdirs), *flags], monkeypatch) == 0
  printed = capsys.readouterr().out
  assert analyze_lib.table(found) in printed
  for each in workdirs:
    written = runs.read_json(each / 'analysis' / f'{STEPS[-1]}.json')
    assert written == found | {'run': each.name}
    for key in figures.FIGURES:
      picture = each / 'analysis' / f'{STEPS[-1]}-{key}.png'
      assert f'written to {picture}' in printed
      assert matplotlib.image.imread(picture).std() > 0.01  # not blank


# What is wrong, and what has to be said.
MISTAKES = {
  'no workdir': ([], ['a WORKDIR is missing']),
  'no such run': (['{empty}'], ['holds no run', 'config.json']),
  'a dense model': (['{dense}'], ['dense model', 'no router to analyze']),
  'no checkpoint': (['{new}'], ['holds no checkpoint yet']),
  'no such key': (['{new}', '--config.moe.topk=1'], ["'moe.top_k'"]),
  'no such flag': (['{new}', '--spilt=test'], ["'--split'"]),
  'no tokens': (['{new}', '--tokens=0'], ['tokens']),
  'another model': (['{new}', '--config.moe.top_k=1'], ['another config']),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_are_one_line_and_status_2(
  mistake: str,
  make_config: Callable[..., ConfigDict],
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  folders_of = {name: tmp_path / name for name in ('empty', 'dense', 'new')}
  for name, folder in folders_of.items():
    folder.mkdir()
    made = make_config(**{'moe.num_experts': 0 if name == 'dense' else N})
    if name != 'empty':
      (folder / saved.CONFIG_FILE).write_text(saved.to_json(made))
  arguments, fragments = MISTAKES[mistake]
  given = [each.format(**folders_of) for each in arguments]
  before = runs.snapshot(tmp_path)
  assert call(given, monkeypatch) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ')
  for fragment in fragments:
    assert fragment in line
  assert runs.snapshot(tmp_path) == before


def test_without_matplotlib(
  config: ConfigDict,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  (tmp_path / saved.CONFIG_FILE).write_text(saved.to_json(config))
  for module in ('analyze', 'figures', 'plots'):
    monkeypatch.delitem(sys.modules, f'moe_jax.analysis.{module}', False)
    monkeypatch.delattr(analysis, module, False)
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  assert call([str(tmp_path)], monkeypatch) == 2
  assert "pip install 'moe_jax[eval]'" in capsys.readouterr().err


def test_what_an_analysis_of_a_dense_model_says(tmp_path: Path) -> None:
  with pytest.raises(UserError, match='dense'):
    analyze(tiny.config(**{'moe.num_experts': 0}), str(tmp_path))
