"""How a run starts: alone, on another one, or not at all, claiming nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import rmoe
from moe_jax.errors import UserError
from moe_jax.training import loop
from moe_jax.training.state import Setup
from tests.helpers import runs


@pytest.fixture(scope='module')
def config(make_config: Callable[..., ConfigDict]) -> ConfigDict:
  return make_config(
    **{
      'model.num_layers': 1,
      'moe.num_experts': 0,
      'train.steps': 2,
      'checkpoint.every': 1,
      'eval.every': 0,
    }
  )


def changed(config: ConfigDict, **values: object) -> ConfigDict:
  copy = config.copy_and_resolve_references()
  copy.update_from_flattened_dict(
    {key.replace('__', '.'): value for key, value in values.items()}
  )
  return copy


@pytest.mark.parametrize(
  ('mistake', 'fragments'),
  [
    (
      {'train__init_from': '/nowhere'},
      ['train.init_from: workdir /nowhere holds no run', 'name another'],
    ),
    (
      {'train__init_from': rmoe.get_config('sft').train.init_from},
      ['train.init_from is not given', 'add --config.train.init_from=WORKDIR'],
    ),
    (
      {'data__order': 'contiguous', 'data__seq_len': 9999},
      ["data.order = 'contiguous'", 'data.seq_len = 9999', 'lower one'],
    ),
  ],
)
def test_refuses_before_the_workdir_is_claimed(
  mistake: dict[str, object],
  fragments: list[str],
  config: ConfigDict,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """So that the same command, corrected, is not another run."""

  def init(self: Setup) -> None:
    pytest.fail('the model was initialised')

  monkeypatch.setattr(Setup, 'init', init)
  with pytest.raises(UserError) as error:
    loop.train(changed(config, **mistake), str(tmp_path / 'run'))
  for fragment in fragments:
    assert fragment in str(error.value)
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_goes_on_without_the_run_it_started_from(
  config: ConfigDict, tmp_path: Path
) -> None:
  origin, workdir = tmp_path / 'origin', tmp_path / 'run'
  loop.train(changed(config, train__steps=1), str(origin))
  start = changed(
    config,
    train__init_from=str(origin),
    train__steps=1,
    optimizer__learning_rate=1e-12,  # stays where it starts
    optimizer__decay_steps=10,
  )
  loop.train(start, str(workdir))
  first, found = (
    runs.restore(config, folder, 1)
    for folder, config in (
      (origin, changed(config, train__steps=1)),
      (workdir, start),
    )
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9),
    found['params'],
    first['params'],
  )
  shutil.rmtree(origin)
  loop.train(changed(start, train__steps=2), str(workdir))
  assert runs.checkpoints(workdir) == [1, 2]
