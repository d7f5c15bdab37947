"""The loss of a split, against the oracle token by token."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict

from moe_jax.data import sources, subwords
from moe_jax.data.pipeline import TokenSequences, eval_batches
from moe_jax.data.tokenizers import ByteTokenizer
from moe_jax.evaluation.perplexity import Perplexity
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training import loop, state
from moe_jax.training.step import make_eval_step
from tests.helpers import oracle, runs, vocabularies

pytestmark = pytest.mark.slow

STEPS, HALF = 4, 2
EOS = 256

# From the bytes of a document to its ids.
Encode = Callable[[bytes], Iterable[int]]


@pytest.fixture(scope='module')
def config(make_config: Callable[..., ConfigDict]) -> ConfigDict:
  return make_config(
    **{
      'model.num_layers': 1,
      'moe.factors': 2,
      'router.recurrent': 'gru',
      'train.steps': STEPS,
      'checkpoint.every': HALF,
      'eval.every': HALF,
      'eval.batch_size': 48,
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


def documents(config: ConfigDict) -> list[bytes]:
  """The validation documents, in the order of the stream."""
  found = sources.open_documents(config.data, 'validation')
  return [found[i].encode() for i in range(len(found))]


def sequences(
  config: ConfigDict, encode: Encode = list, eos: int = EOS
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Inputs and targets of every window, the last one as short as it is."""
  pieces = [[eos, *encode(text)] for text in documents(config)]
  stream = np.concatenate([*pieces, [eos]])
  length = config.data.seq_len
  return [
    (stream[i : i + length][: len(stream) - 1 - i], stream[i + 1 :][:length])
    for i in range(0, len(stream) - 1, length)
  ]


def nats(
  config: ConfigDict,
  params: Any,
  disable_top: int = 0,
  read: list[tuple[np.ndarray, np.ndarray]] | None = None,
) -> float:
  """Minus the log probability of the whole stream, in float64."""
  total = 0.0
  for inputs_L, targets_L in read or sequences(config):
    sequence = oracle.Sequence(config, params, disable_top=disable_top)
    logits_LV = sequence.run(inputs_L)
    shares_LV = oracle.softmax(logits_LV)
    total -= np.log(shares_LV[np.arange(len(targets_L)), targets_L]).sum()
  return total


def test_the_split_is_what_the_tests_below_need(
  config: ConfigDict, texts: Path
) -> None:
  files = [path.read_bytes() for path in texts.iterdir()]
  assert len(documents(config)) == 2 and set(documents(config)) < set(files)
  cut = sequences(config)
  assert len(cut) % config.eval.batch_size > 0
  assert 0 < len(cut[-1][0]) < config.data.seq_len


@pytest.mark.parametrize('step', [None, HALF])
def test_equals_the_oracle(
  config: ConfigDict, workdir: Path, step: int | None
) -> None:
  named = step or STEPS
  params = runs.restore(config, workdir, named)['params']
  total = nats(config, params)
  num_bytes = sum(map(len, documents(config)))
  num_tokens = num_bytes + len(documents(config))  # an eos after each

  result = runs.evaluate(config, workdir, step)

  loss = total / num_tokens
  assert result == {
    'step': named,
    'loss': pytest.approx(loss, rel=1e-6),
    'perplexity': pytest.approx(math.exp(loss), rel=1e-5),
    'bits_per_byte': pytest.approx(total / math.log(2) / num_bytes, rel=1e-6),
    'tokens': num_tokens,
  }


@pytest.mark.thorough
def test_bits_per_byte_of_one_model_with_two_tokenizers(
  config: ConfigDict, tmp_path: Path
) -> None:
  """A byte counts alike, whatever the tokens: of sub-words the library's."""
  path = vocabularies.write(tmp_path, 'bpe')
  library = tokenizers.Tokenizer.from_file(str(path))
  encoders: dict[str, tuple[Encode, int]] = {
    'bytes': (list, EOS),
    str(path): (
      lambda text: library.encode(text.decode(), add_special_tokens=False).ids,
      subwords.load(str(path)).eos_id,
    ),
  }
  num_bytes = sum(map(len, documents(config)))
  for name, encoder in encoders.items():
    config = config.copy_and_resolve_references()
    config.model.vocab_size = 512
    config.data.tokenizer = name
    setup = state.from_config(config)
    params = setup.init(None)['params']
    [result] = Perplexity(setup, 'validation')(params)
    read = sequences(config, *encoder)
    bits = nats(config, params, read=read) / math.log(2) / num_bytes
    assert result.metrics['bits_per_byte'] == pytest.approx(bits, rel=1e-6)
    assert result.metrics['tokens'] == sum(len(ids) for ids, _ in read)


def test_without_the_best_expert_of_every_token(
  config: ConfigDict, workdir: Path
) -> None:
  """CartesianMoE's Table 4, and its own file beside the usual one."""
  disabled = config.copy_and_resolve_references()
  disabled.eval.disable_top = 1
  params = runs.restore(config, workdir, STEPS)['params']
  result = runs.evaluate(disabled, workdir)
  loss = nats(config, params, disable_top=1) / result['tokens']
  assert result['loss'] == pytest.approx(loss, rel=1e-6)
  assert result['loss'] != runs.evaluate(config, workdir)['loss']
  written = workdir / 'evaluation' / f'validation-{STEPS}-without-top-1.json'
  assert json.loads(written.read_text()) == {'split': 'validation'} | result
  assert result['disabled_top'] == 1


def test_training_reports_the_same(config: ConfigDict, workdir: Path) -> None:
  logged = runs.rows(workdir, 'validation')
  for row, step in zip(logged, (HALF, STEPS), strict=True):
    result = runs.evaluate(config, workdir, step)
    assert row == {'split': 'validation'} | result


def test_training_marks_evaluations_without_the_best_experts(
  config: ConfigDict, workdir: Path, tmp_path: Path
) -> None:
  """A row of its own name, which says how many; the same numbers."""
  disabled = config.copy_and_resolve_references()
  disabled.eval.disable_top = 1
  disabled.train.steps = disabled.eval.every = HALF
  loop.train(disabled, str(tmp_path))
  assert not runs.rows(tmp_path, 'validation')
  (row,) = runs.rows(tmp_path, 'validation-without-top-1')
  result = runs.evaluate(disabled, tmp_path)
  assert row == {'split': 'validation-without-top-1'} | result
  assert row['disabled_top'] == 1


def test_equal_on_every_mesh(config: ConfigDict, workdir: Path) -> None:
  tokenizer = ByteTokenizer()
  params = runs.restore(config, workdir, STEPS)['params']
  shapes = {1: {}, 8: {'context': 2, 'expert': 2, 'tensor': 2}}
  losses = {}
  for count, shape in shapes.items():
    mesh = mesh_lib.make_mesh(
      dict.fromkeys(mesh_lib.MESH_AXES, 1) | shape, jax.devices()[:count]
    )
    # Other batches too: one device need not divide anything.
    here = config.copy_and_resolve_references()
    here.eval.batch_size = {1: 7, 8: 20}[count]
    setup = dataclasses.replace(
      state.setup(here, tokenizer.vocab_size, mesh), tokenizer=tokenizer
    )
    placed = jax.tree.map(
      lambda array, leaf: jax.device_put(array, leaf.sharding),
      params,
      setup.abstract['params'],
    )
    [result] = Perplexity(setup, 'validation')(placed)
    losses[count] = result.metrics
  assert losses[1].keys() == losses[8].keys()
  for name, value in losses[1].items():
    assert losses[8][name] == pytest.approx(value, rel=1e-6), name


def test_padding_is_not_counted_as_routed(
  config: ConfigDict, workdir: Path
) -> None:
  prepared = loop.prepare(config)
  size = config.eval.batch_size
  split = TokenSequences.open(
    config.data, 'validation', prepared.setup.tokenizer
  )
  *_, last = eval_batches(split, batch_size=size, rows=range(size))
  assert not last['padding_mask'].all()
  params = runs.restore(config, workdir, STEPS)['params']
  load = make_eval_step(prepared.setup)(params, last)['load']

  full = len(sequences(config)) // size * size
  counts = np.zeros(load.counts_N.shape)
  entropy = np.zeros(load.entropy.shape)
  tokens = 0
  for inputs_L, _ in sequences(config)[full:]:
    sequence = oracle.Sequence(config, params)
    sequence.run(inputs_L)
    tokens += len(inputs_L)
    for i, (shares_LN, chosen) in enumerate(sequence.routed):
      place = divmod(i, config.moe.factors)
      np.add.at(counts[place], np.concatenate(chosen), 1)
      entropy[place] -= (shares_LN * np.log(shares_LN)).sum()
  np.testing.assert_array_equal(load.counts_N, counts)
  np.testing.assert_array_equal(load.tokens, np.full(entropy.shape, tokens))
  np.testing.assert_allclose(load.entropy, entropy, rtol=1e-5)


def test_the_program(
  config: ConfigDict, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  before = runs.snapshot(workdir)
  flags = [*runs.arguments(config, workdir), f'--step={HALF}']
  assert runs.call('eval.py', [*flags, '--split=train[:40%]']) == 0
  printed = capsys.readouterr().out
  after = runs.snapshot(workdir)
  (new,) = after.keys() - before.keys() - {'evaluation'}
  assert before.items() <= after.items()
  assert new in printed and 'bits per byte' in printed
  row = json.loads(after[new])
  assert row['split'] == 'train[:40%]' and row['step'] == HALF
  assert f'{row["loss"]:.4f}' in printed and f'{row["tokens"]:,}' in printed
  assert row['perplexity'] == pytest.approx(math.exp(row['loss']))


def test_a_model_of_no_finite_numbers_is_told_in_json(
  config: ConfigDict,
  workdir: Path,
  tmp_path: Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  broken = runs.restore(config, workdir, STEPS)
  broken['params']['head_DV'] = np.full_like(
    broken['params']['head_DV'], np.nan
  )
  with runs.claimed(config, tmp_path) as checkpointer:
    checkpointer.save(STEPS, jax.tree.map(jax.numpy.asarray, broken))
  runs.evaluate(config, tmp_path)
  assert 'validation: the loss is nan' in capsys.readouterr().out

  def refuse(constant: str) -> None:
    raise AssertionError(f'{constant} is no JSON')

  path = tmp_path / f'evaluation/validation-{STEPS}.json'
  row = json.loads(path.read_text(), parse_constant=refuse)
  assert row['loss'] == row['perplexity'] == row['bits_per_byte'] == 'NaN'
