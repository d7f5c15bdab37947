"""A run's config beside its checkpoints, and what may change on resume."""

import contextlib
import filecmp
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from moe_jax import files, strict_json
from moe_jax.config import mixture
from moe_jax.config.derived import decay_end, flatten
from moe_jax.config.schema import KEYS, get_config

# The section of a key that exists no longer says whether it was the model's.
_MODEL = ('model', 'moe', 'router')
# Of a workdir: its config, and the record of what ran.
CONFIG_FILE, RECORD_FILE = 'config.json', 'run.json'
# Splits of lines in metrics.jsonl that measure nothing: a step that changed
# nothing, and a return to an earlier checkpoint.
SKIPPED_STEP, ROLLBACK = 'skipped_step', 'rollback'
_DECAY = ('train.steps', 'optimizer.decay_steps', 'optimizer.warmup_steps')
# What is read: with data.changed = 'allow' a run goes on with something else.
_SOURCES = (
  *('data.name', 'data.text_key', 'data.format', 'data.train_split'),
  *('data.mixture', 'data.temperature'),
)
_ABSENT = 'absent'


def to_json(config: ConfigDict) -> str:
  """Returns readable JSON, of which `from_json` makes an equal config."""
  return strict_json.dumps(config.to_dict(), indent=2) + '\n'


def from_json(text: str) -> ConfigDict:
  """Returns the config that `to_json` wrote, locked.

  A key younger than the run has the default of today's schema: a key is only
  added with a default that does what was done without it.

  Args:
    text: The JSON of a config.

  Raises:
    ValueError: `text` is not a JSON object.
  """
  given = files.parse_json(text)
  if not isinstance(given, dict):
    raise ValueError(f'a {type(given).__name__} and not an object')
  return ConfigDict(_filled(given, get_config().to_dict())).lock()


def own_tokenizer(workdir: str, named: str) -> str:
  """Returns the file that is the tokenizer of the run in `workdir`.

  It is what the run made a copy of, while that has the same content, and
  otherwise the copy.

  Args:
    workdir: The directory of the run.
    named: The `data.tokenizer` of its config.

  Returns:
    The path; '' where there is no copy.
  """
  kept = os.path.join(workdir, files.tokenizer_file(named))
  if not os.path.isfile(kept):
    return ''
  with contextlib.suppress(OSError):
    if filecmp.cmp(kept, named, shallow=False):
      return named
  return kept


def changed_meaning(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[str]:
  """Returns the keys by which a run of `old` cannot go on with `new`.

  A key that only one side has counts as changed: `from_json` knows the younger
  ones, so it is one that no longer exists. Of `train.steps` and
  `optimizer.decay_steps` only the end of the decay counts that they come to.

  Args:
    old: The config that the run was made with, a dictionary of sections.
    new: The config to go on with.
  """
  changed = [key for key in _differing(old, new) if not _may_change(key)]
  if new.get('data', {}).get('changed') == 'allow':
    changed = [key for key in changed if key not in _SOURCES]
  mixtures = [flatten(each).get('data.mixture', '') for each in (old, new)]
  if mixture.without_paths(mixtures[0]) == mixture.without_paths(mixtures[1]):
    changed = [key for key in changed if key != 'data.mixture']
  # What a file holds says whether it is another tokenizer, not where it lies.
  named = [flatten(each).get('data.tokenizer', '') for each in (old, new)]
  if all(files.tokenizer_file(str(name)) for name in named):
    changed = [key for key in changed if key != 'data.tokenizer']
  if _decay_end(old) is not None and _decay_end(old) == _decay_end(new):
    changed = [key for key in changed if key not in _DECAY[:2]]
  return changed


def changed_model(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Returns the keys by which `new` is another model to evaluate than `old`.

  Of `loss.bias_rate` it counts whether it is 0: the bias is a parameter.
  """
  also = set()
  # These have the ids of the data set that the model was trained on.
  if new['data']['tokenizer'] in ('enwik8', 'words'):
    also.add('data.name')
  if has_expert_bias(old) != has_expert_bias(new):
    also.add('loss.bias_rate')
  return [
    key
    for key in changed_meaning(old, new)
    if key in also or _is_of_function(key)
  ]


def has_expert_bias(config: Mapping[str, Any]) -> bool:
  """Returns whether the model has biases that balance the choice of experts."""
  return flatten(config).get('loss.bias_rate', 0) > 0


def describe(
  keys: list[str], old: Mapping[str, Any], new: Mapping[str, Any]
) -> str:
  """Returns `a.b was 1, now 2; ...`, with the remedy of a key that has one."""
  parts = _described(keys, old, new)
  end = _decay_end(old)
  if end is not None and 'train.steps' in keys:
    parts.append(
      f'--config.optimizer.decay_steps={end} keeps the learning rates'
      ' of the run and lets train.steps change'
    )
  if set(keys) & set(_SOURCES):
    parts.append(
      '--config.data.changed=allow goes on with other data, from the same step'
    )
  return '; '.join(parts)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
  """Returns `a.b was 1, now 2; ...` of all keys that differ."""
  return '; '.join(_described(_differing(old, new), old, new))


def _described(
  keys: list[str], old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[str]:
  before, after = flatten(old), flatten(new)
  return [
    f'{key} was {before.get(key, _ABSENT)!r}, now {after.get(key, _ABSENT)!r}'
    for key in keys
  ]


def _filled(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
  """Returns `given`, with `defaults` for the keys that it lacks."""
  filled = defaults | given
  for name, default in defaults.items():
    if isinstance(default, dict) and isinstance(filled[name], dict):
      filled[name] = _filled(filled[name], default)
  return filled


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  before, after = flatten(old), flatten(new)
  return [
    key
    for key in before | after
    if key not in before or key not in after or before[key] != after[key]
  ]


def _decay_end(config: Mapping[str, Any]) -> int | None:
  """Returns where the decay ends; None where a key for it is missing."""
  if all(key in flatten(config) for key in _DECAY):
    return decay_end(ConfigDict(config))
  return None


def _may_change(key: str) -> bool:
  """Returns whether a run may go on with another value of the key."""
  return key in KEYS and KEYS[key].resume


def _is_of_function(key: str) -> bool:
  """Returns whether the function of the same parameters depends on the key."""
  if key in KEYS:
    return KEYS[key].function
  return key.split('.')[0] in _MODEL
