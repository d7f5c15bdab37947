"""The class of a user's own that docs/extending.md shows does what it says."""

import re
from pathlib import Path

import jax
import pytest

from moe_jax import parameter
from moe_jax.config import loading
from moe_jax.registry import GATES
from moe_jax.training import optimizer
from tests.helpers import registries, tiny
from tests.helpers.steps import setup

PAGE = Path(__file__).parents[1] / 'docs' / 'extending.md'


def test_the_gate_of_the_page_is_replicated_and_not_decayed(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  registries.forget(monkeypatch, GATES)
  [code] = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
  file = tmp_path / 'my_gate.py'
  file.write_text(code)
  config = loading.load(str(file))
  assert config.router.score == 'scaled'
  made = setup(tiny.config(**{'router.score': 'scaled'}), expert=4, fsdp=2)
  params = parameter.flatten(made.abstract['params'])
  [factor] = [keys for keys in params if keys[-1] == 'factor_N']
  assert params[factor].shape == (2, 8)  # layers, experts
  assert params[factor].sharding.is_fully_replicated
  decayed = parameter.flatten(optimizer.decayed(made.declarations))
  assert not decayed[factor]
  assert any(jax.tree.leaves(decayed))
