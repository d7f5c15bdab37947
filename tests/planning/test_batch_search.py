"""The search for a batch and a policy, with programs that are made up."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from moe_jax.errors import UserError
from moe_jax.planning import batch_search, compiled, plan, topologies
from moe_jax.planning.batch_search import POLICIES, Trial
from moe_jax.planning.memory import Estimate
from tests.helpers import tiny

AVAILABLE = 1000
# Bytes of a sequence under each policy, on top of 100.
NEEDS = {'none': 40, 'dots': 20, 'full': 5}


def attempt(batch_size: int, remat: str) -> Trial:
  needed = 100 + NEEDS[remat] * batch_size
  return Trial(batch_size, remat, needed, AVAILABLE)


def estimates(missed: float) -> dict[str, Estimate]:
  """What needs so many times less than it will."""
  return {
    remat: Estimate(round(100 / missed), needs / missed)
    for remat, needs in NEEDS.items()
  }


@pytest.mark.parametrize(
  'wanted, missed, start',
  list(
    itertools.product(
      [4, 16, 24, 40, 100, 176, 180, 400], [0.5, 1.0, 1.7], POLICIES
    )
  ),
)
def test_search_finds_what_trying_all_would(
  wanted: int, missed: float, start: str
) -> None:
  unit = 4
  trials = batch_search.search(wanted, unit, estimates(missed), start, attempt)
  best = batch_search.best(trials)

  holding = [remat for remat in POLICIES if attempt(wanted, remat).fits]
  remat = holding[0] if holding else 'full'
  batches = [b for b in range(unit, 1000, unit) if attempt(b, remat).fits]
  assert best.remat == remat and best.fits and best.batch_size % unit == 0
  # To an eighth, or to the unit.
  at_least = min(batches[-1] - unit, batches[-1] / (1 + 1 / 8))
  assert at_least <= best.batch_size <= batches[-1]
  assert len(trials) <= 9
  assert len(set(trials)) == len(trials)


def test_a_good_estimate_takes_few_trials() -> None:
  trials = batch_search.search(16, 4, estimates(1.0), 'none', attempt)
  assert len(trials) <= 4 and batch_search.best(trials).batch_size == 20


def test_nothing_fits() -> None:
  def too_large(batch_size: int, remat: str) -> Trial:
    return Trial(batch_size, remat, 2 * AVAILABLE, AVAILABLE)

  trials = batch_search.search(64, 8, estimates(1.0), 'dots', too_large)
  assert batch_search.best(trials) is None
  assert trials[-1].batch_size == 8 and trials[-1].remat == 'full'


@pytest.mark.parametrize(
  'missed, said',
  [
    # There is room for 500 / missed of what is estimated.
    (1.5, "by estimate model.remat = 'dots' would"),
    (2.5, "by estimate model.remat = 'full' would"),
    (20, "train.batch_size = 12 with model.remat = 'full' would"),
    (1000, 'by estimate no batch would; take more devices'),
  ],
)
def test_advice_follows_from_what_was_needed(
  monkeypatch: pytest.MonkeyPatch, missed: float, said: str
) -> None:
  bytes_of = {'none': 8, 'dots': 4, 'full': 2}  # of 64 sequences 512, 256, 128
  estimated = {name: Estimate(0, each) for name, each in bytes_of.items()}
  monkeypatch.setattr(
    batch_search, '_estimates', lambda config, target: estimated
  )
  config = tiny.config(train__batch_size=64, mesh__data=4)
  refused = compiled.DoesNotFitError(round(512 * missed), 500)
  target = topologies.Target([None] * 4, None)
  advice = batch_search.advice(config, target, refused)
  assert said in advice, advice


def test_batches_divide_among_devices_and_micro_batches() -> None:
  config = tiny.config(
    mesh__data=2, mesh__tensor=2, train__accumulation=3, train__batch_size=12
  )
  target = topologies.Target([None] * 4, None)
  assert batch_search.unit(config, target) == 6


def test_a_device_that_does_not_say_what_it_holds() -> None:
  with pytest.raises(UserError, match='--fit needs devices.*--topology'):
    batch_search.find(tiny.config(), topologies.here(), lambda trial: None)


@pytest.mark.parametrize(
  'key, value',
  [('train.accumulation', 0), ('model.num_layers', 0), ('model.num_heads', 3)],
)
def test_mistakes_are_told_before_anything_is_planned(
  key: str, value: int
) -> None:
  config = tiny.config(**{key: value})
  with pytest.raises(UserError, match=rf'{key}|is not divisible by {key}'):
    batch_search.find(config, topologies.target('v5e:2x2'), lambda trial: None)


@pytest.fixture
def cache_as_before() -> Iterator[None]:
  """A program that compiles switches jax's cache off."""
  before = jax.config.jax_enable_compilation_cache
  yield
  jax.config.update('jax_enable_compilation_cache', before)


@pytest.mark.usefixtures('cache_as_before')
def test_the_plan_is_of_what_was_found(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  """On a v5e of 15.75 GiB: so many sequences of each policy take one."""
  per_gib = {'none': 1, 'dots': 2, 'full': 4}

  def compile_(config: ConfigDict, target: topologies.Target) -> dict[str, Any]:
    needed = (config.train.batch_size << 30) // per_gib[config.model.remat]
    if needed > target.chip.memory_bytes:
      raise compiled.DoesNotFitError(needed, target.chip.memory_bytes)
    available = target.chip.memory_bytes
    return {'memory_bytes': {'total': needed}, 'available_bytes': available}

  estimated = {name: Estimate(0, 1e9 / n) for name, n in per_gib.items()}
  monkeypatch.setattr(
    batch_search, '_estimates', lambda config, target: estimated
  )
  monkeypatch.setattr(compiled, 'compile_and_report', compile_)
  plan.run(
    tiny.config(train__batch_size=24, mesh__fsdp=4, mesh__data=1),
    json=True,
    devices=None,
    topology='v5e:2x2',
    slices=1,
    compile=False,
    fit=True,
  )
  out, err = capsys.readouterr()
  found = json.loads(out)['fit']
  # 24 are too many without rematerialisation; with some, 28 is the most.
  assert found['overrides'] == {'train.batch_size': 28, 'model.remat': 'dots'}
  assert found['spare_bytes'] == (63 << 28) - (14 << 30)
  assert json.loads(out)['tokens_per_step'] == 28 * 16
  assert len(err.splitlines()) == len(found['trials'])
  assert 'batch 24, remat none: 24.00 GiB of 15.75 GiB, does not fit' in err
