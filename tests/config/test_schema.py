"""The schema: every key is told, and what follows from it agrees."""

from pathlib import Path

import pytest

from moe_jax import config as config_lib
from moe_jax.config import help as config_help
from moe_jax.config.keys import Key
from moe_jax.config.schema import KEYS, SECTIONS
from moe_jax.errors import UserError

DOCS = Path(__file__).parents[2] / 'docs'


def test_the_defaults_are_in_their_ranges_and_config() -> None:
  flat = config_lib.flatten(config_lib.get_config().to_dict())
  assert flat == {name: key.default for name, key in KEYS.items()}
  for name, key in KEYS.items():
    key.check(name, key.default)


def test_every_key_has_a_meaning_and_lies_in_a_section() -> None:
  for name, key in KEYS.items():
    assert key.meaning.endswith(('.', '...')), name
    section = name.rpartition('.')[0]
    assert not section or section in SECTIONS, name


def test_a_key_is_not_both_free_on_resume_and_part_of_the_function() -> None:
  for name, key in KEYS.items():
    assert not (key.resume and key.function), name


def test_every_section_and_key_can_be_asked_for() -> None:
  for section in SECTIONS:
    told = config_help.section(section)
    for name, key in KEYS.items():
      if name.startswith(f'{section}.'):
        assert f'--config.{name}={key.default}' in told
  assert 'dropless, capacity' in config_help.section('moe.dispatch')
  with pytest.raises(UserError, match="did you mean 'model'"):
    config_help.section('modle')


def test_the_table_of_keys_in_the_docs_is_of_this_schema() -> None:
  """`python -m moe_jax.config.help > docs/configs.md` makes it so."""
  assert (DOCS / 'configs.md').read_text() == config_help.table() + '\n'


@pytest.mark.parametrize(
  'text, value',
  [('7', 7), ('-1', -1)],
)
def test_whole_numbers_are_read(text: str, value: int) -> None:
  assert Key(0, '').parse('a.b', text) == value


@pytest.mark.parametrize('text', ['3.5', '1e3', 'x', ''])
def test_other_numbers_are_refused_in_our_words(text: str) -> None:
  with pytest.raises(UserError, match="a.b = '.*' must be a whole number, at"):
    Key(0, '').parse('a.b', text)


@pytest.mark.parametrize('text, value', [('true', True), ('FALSE', False)])
def test_booleans_are_read(text: str, value: bool) -> None:
  assert Key(False, '').parse('a.b', text) is value
