"""Runs of train.py and eval.py, as processes of their own or in this one."""

import contextlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event

from moe_jax import config as config_lib
from moe_jax import runtime
from moe_jax.evaluation import checkpoints as evaluation
from moe_jax.training import loop
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.run_dir import RunDir

ROOT = Path(__file__).parents[2]


def arguments(config: ConfigDict, workdir: Path | str) -> list[str]:
  """The command line of a run with `config`."""
  old = config_lib.flatten(config_lib.get_config().to_dict())
  new = config_lib.flatten(config.to_dict())
  changed = [f'--config.{k}={v}' for k, v in new.items() if v != old[k]]
  return ['--config=configs/base.py', f'--workdir={workdir}', *changed]


def start(program: str, flags: list[str], **env: str) -> subprocess.Popen[str]:
  """Starts a program on one CPU device, with `env` in its environment."""
  return subprocess.Popen(
    [sys.executable, program, *flags],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'} | env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def call(program: str, flags: list[str]) -> int:
  """Runs a program in this process, on its devices; returns its exit status."""
  with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
    patch.chdir(ROOT)
    patch.setattr(sys, 'argv', [program, *flags])
    # It would tune malloc for the rest of the tests too.
    patch.setenv(runtime.SWITCH, '0')
    runpy.run_path(str(ROOT / program), run_name='__main__')
  assert isinstance(stop.value.code, int)
  return stop.value.code


def train_in_two(config: ConfigDict, workdir: Path, first: int) -> None:
  """Trains up to a step, and goes on from there to the end."""
  begun = config.copy_and_resolve_references()
  begun.train.steps = first
  loop.train(begun, str(workdir))
  loop.train(config, str(workdir))


def rows(workdir: Path, split: str | None = None) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl, all or those of a split."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  found = [json.loads(line) for line in lines]
  return [row for row in found if split in (None, row['split'])]


def timeless_rows(workdir: Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl without what the clock says."""
  found = rows(workdir)
  for row in found:
    for name in ('tokens_per_second', 'tflops_per_second', 'mfu', 'data_wait'):
      row.pop(name, None)
  return found


def checkpoints(workdir: Path) -> list[int]:
  """The steps that there are checkpoints of."""
  return sorted(int(name) for name in os.listdir(workdir / 'checkpoints'))


def restore(config: ConfigDict, workdir: Path, step: int) -> dict[str, Any]:
  """The whole state of a checkpoint, as numpy arrays."""
  abstract = loop.prepare(config).setup.abstract
  with Checkpointer(RunDir.existing(str(workdir), config)) as checkpointer:
    state = checkpointer.restore(abstract, step).state
  assert state['step'] == step
  return jax.tree.map(np.asarray, state)


@contextlib.contextmanager
def claimed(
  config: ConfigDict, workdir: Path, vocabulary: str | None = None
) -> Iterator[Checkpointer]:
  """The checkpoints of a run that `workdir` is made the directory of."""
  run = RunDir.new_or_resumed(str(workdir), config)
  with Checkpointer(run, vocabulary) as checkpointer:
    run.claim()
    yield checkpointer


@contextlib.contextmanager
def opened(
  config: ConfigDict, workdir: Path, vocabulary: str | None = None
) -> Iterator[Checkpointer]:
  """The checkpoints of a run, to be read."""
  run = RunDir.existing(str(workdir), config)
  with Checkpointer(run, vocabulary) as checkpointer:
    yield checkpointer


def evaluate(
  config: ConfigDict,
  workdir: Path,
  step: int | None = None,
  split: str | None = None,
) -> dict[str, float]:
  """What is found of the one split of a checkpoint."""
  results = evaluation.evaluate(config, str(workdir), step=step, split=split)
  [metrics] = results.values()
  return metrics


def snapshot(folder: Path) -> dict[str, bytes | None]:
  """Everything below `folder`: the bytes of files, None for folders."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in folder.rglob('*')
  }


def read_json(path: Path) -> dict[str, Any]:
  """The object that a file holds."""
  return json.loads(path.read_text())


def events(directory: Path) -> list[Event]:
  """The records of all event files, in the order they were made."""
  found = []
  files = sorted((directory / 'tensorboard').iterdir())
  for content in [file.read_bytes() for file in files]:
    while content:
      size = int.from_bytes(content[:8], 'little')
      body = content[12 : 12 + size]
      crc = int.from_bytes(content[12 + size : 16 + size], 'little')
      assert crc == masked_crc(body)
      found.append(Event.FromString(body))
      content = content[16 + size :]
  return found


def masked_crc(data: bytes) -> int:
  """The CRC-32C of `data`, bit by bit, masked as TFRecord has it."""
  crc = 2**32 - 1
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 2**32 - 1
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
