"""`load` gives what training left and what was released."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import load
from moe_jax.errors import UserError
from tests.helpers import runs, tiny
from tests.helpers.released import RELEASED


@pytest.mark.parametrize('name', ['rmoe_gru', 'cartesian'])
def test_a_released_checkpoint_gives_the_reference_logits(name: str) -> None:
  expected = np.load(RELEASED / name / 'reference.npz')
  model, tokenizer, config = load(RELEASED / name)
  assert tokenizer is None
  assert model.step is None
  logits = model(expected['input_ids'])
  assert logits.dtype == jnp.float32
  most = np.abs(expected['logits']).max()
  np.testing.assert_allclose(logits, expected['logits'], atol=1e-4 * most)
  np.testing.assert_array_equal(
    model.params['embed_VD'].shape[0], config.model.vocab_size
  )


def test_the_routing_is_the_references() -> None:
  expected = np.load(RELEASED / 'rmoe_gru' / 'reference.npz')
  model, _, config = load(RELEASED / 'rmoe_gru')
  ids = expected['input_ids']
  routing = model.routing(ids)
  assert routing is not None
  layers = config.model.num_layers
  shape = (layers, 1, *ids.shape, config.moe.top_k)
  assert routing.indices_TK.shape == shape
  for layer in range(layers):
    theirs = expected[f'router_logits_{layer}']
    ours = np.asarray(routing.logits_TN[layer, 0]).reshape(theirs.shape)
    most = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * most)


def test_ids_may_have_any_leading_axes() -> None:
  model, _, _ = load(RELEASED / 'cartesian')
  ids = [3, 14, 15, 92]
  alone = model.logits(ids)
  assert alone.shape == (4, 97)
  np.testing.assert_allclose(model.logits([[ids]])[0, 0], alone, atol=1e-5)
  with pytest.raises(UserError, match='from 3 to 97, .* has 97'):
    model.logits([3, 97])
  with pytest.raises(UserError, match='not integers'):
    model.logits([0.5])


@pytest.mark.parametrize('name', ['rmoe_gru', 'cartesian'])
def test_the_next_token_is_the_references_likeliest(name: str) -> None:
  """After every beginning of its text, all of them in one batch."""
  expected = np.load(RELEASED / name / 'reference.npz')
  model, _, _ = load(RELEASED / name)
  ids, logits = expected['input_ids'][0], expected['logits'][0]
  prompts = [ids[: n + 1] for n in range(len(ids))]
  found = model.generate(prompts, max_tokens=1)
  assert found == [[token] for token in logits.argmax(-1)]


@pytest.mark.slow
def test_what_follows_is_what_the_logits_say() -> None:
  model, _, _ = load(RELEASED / 'cartesian')
  prompts = [[3, 14, 15, 92], [6], [5, 3]]
  found = model.generate(prompts, max_tokens=8)
  for prompt, ids in zip(prompts, found, strict=True):
    whole = np.array([*prompt, *ids])
    best = np.asarray(model.logits(whole)).argmax(-1)
    np.testing.assert_array_equal(best[len(prompt) - 1 : -1], ids)
  assert model.generate(prompts[:1], max_tokens=8, end_id=found[0][4]) == [
    found[0][: found[0].index(found[0][4])]
  ]
  warm = model.generate(prompts, max_tokens=8, temperature=2.0, seed=1)
  assert warm != found


@pytest.mark.slow
def test_a_run_is_loaded_at_any_step(tmp_path: Path) -> None:
  config = tiny.config(
    **{
      'train.steps': 2,
      'checkpoint.every': 1,
      'checkpoint.keep': 2,
      'eval.every': 0,
      'data.name': 'text_folder',
      'data.path': str(_texts(tmp_path / 'texts')),
    }
  )
  workdir = tmp_path / 'run'
  assert runs.call('train.py', runs.arguments(config, workdir)) == 0
  newest, tokenizer, _ = load(workdir)
  first, _, _ = load(workdir, step=1)
  assert (newest.step, first.step) == (2, 1)
  assert tokenizer is not None
  ids = tokenizer.encode('to be or')
  logits = newest.logits(ids)
  assert logits.shape == (len(ids), tokenizer.vocab_size)
  assert np.abs(logits - first.logits(ids)).max() > 0
  leaves = jax.tree.leaves(newest.params)
  assert all(np.isfinite(leaf).all() for leaf in leaves)


def _texts(folder: Path) -> Path:
  folder.mkdir()
  for split in ('train', 'validation'):
    (folder / f'{split}.txt').write_text('to be or not to be ' * 200)
  return folder
