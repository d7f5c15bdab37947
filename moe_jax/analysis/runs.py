"""What a run's metrics.jsonl says, as arrays."""

import dataclasses
import json
import os
from typing import Any

import numpy as np

from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
  """What metrics.jsonl says of one run; P points and W MoE layers.

  Attributes:
    name: The name of the run's directory.
    steps_P: The steps at which training was logged.
    loss_P: The loss there, nats per token.
    max_load_PW: The rows of the busiest expert over the balanced share; W is 0
      for a dense model.
    dropped_PW: The share of the assignments that found no room.
    evaluations: The rows of every evaluation by its split, in order of steps.
  """

  name: str
  steps_P: np.ndarray
  loss_P: np.ndarray
  max_load_PW: np.ndarray
  dropped_PW: np.ndarray
  evaluations: dict[str, list[dict[str, Any]]]


def read(workdir: str) -> Run:
  """Reads DIR/metrics.jsonl.

  Raises:
    UserError: There is none, or it holds no step of training, or something
      else than metrics.
  """
  path = os.path.join(workdir, 'metrics.jsonl')
  train: list[dict[str, Any]] = []
  evaluations: dict[str, list[dict[str, Any]]] = {}
  for row in _rows(path):
    if row['split'] == 'train':
      train.append(row)
    else:
      evaluations.setdefault(row['split'], []).append(row)
  if not train:
    raise UserError(f'{path} holds no step of training yet')

  def column(key: str) -> np.ndarray:
    return np.array([row.get(key, []) for row in train], float)

  try:
    return Run(
      os.path.basename(os.path.abspath(workdir)),
      column('step'),
      column('loss'),
      column('max_load').reshape(len(train), -1),
      column('dropped_share').reshape(len(train), -1),
      evaluations,
    )
  except ValueError as error:
    raise UserError(f'{path} is not of one run: {error}') from error


def _rows(path: str) -> list[dict[str, Any]]:
  """Returns the objects of a metrics.jsonl, without a last line cut short."""
  try:
    with open(path, encoding='utf-8') as file:
      lines = file.read().splitlines()
  except OSError as error:
    raise UserError(
      f'{path} cannot be read: {error.strerror};'
      ' give the --workdir of a training run'
    ) from error
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
      rows.append({'step': row['step'], 'split': row['split']} | row)
    except (ValueError, TypeError, KeyError) as error:
      if number == len(lines):
        break
      raise UserError(
        f'{path}:{number} is not a JSON object with a step and a split'
      ) from error
  return rows


def training_seconds(workdir: str, tokens_per_step: int) -> float | None:
  """Returns how long the steps of a run took, from their logged speeds.

  Interruptions, evaluations and, but for a logged first step, compilation are
  not in it. It is None where no step was logged.

  Args:
    workdir: The directory of the run.
    tokens_per_step: The tokens of a step.

  Raises:
    UserError: DIR/metrics.jsonl cannot be read.
  """
  seconds, before = 0.0, 0
  for row in _rows(os.path.join(workdir, 'metrics.jsonl')):
    if row['split'] == 'train':
      tokens = (row['step'] - before) * tokens_per_step
      seconds, before = seconds + tokens / row['tokens_per_second'], row['step']
  return seconds or None
