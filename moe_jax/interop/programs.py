"""What the commands of `moe_jax.interop.hf` and `.upcycle` do.

Success is reported only after both sides were read back from the disk and gave
the same logits in float32. What is written appears at its place last, whole.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict

from moe_jax.errors import UserError
from moe_jax.interop import (
  formats,
  released,
  tensor_writer,
  workdirs,
)
from moe_jax.interop.released_keys import read_json

# Of both sides' largest logit: the same float32 program, or one that sums in
# another order where layers are grouped in another way.
_TOLERANCE = 1e-5
_IDS_SHAPE = (2, 48)
_NUM_IDS = 2 * 48
_SMALLEST = 1e-30  # a logit to divide by
_LONGEST = 'max_position_embeddings'


def import_(checkpoint: Path, workdir: Path, tokenizer: str) -> str:
  """Makes a workdir of a released checkpoint; returns what to say."""
  layout, _ = formats.read(checkpoint)
  sections, params = released.load(checkpoint)
  longest = read_json(checkpoint / 'config.json').get(_LONGEST)
  config = workdirs.full_config(sections, tokenizer, longest)
  with _appears(workdir) as made:
    workdirs.write(made, config, params)
    proof = _prove(workdirs.read(made, None)[:2], (sections, params))
  return f'{workdir}: the model of {checkpoint} ({layout}); {proof}'


def export(
  workdir: Path,
  checkpoint: Path,
  format: str | None,
  dtype: str,
  max_shard_bytes: int,
  step: int | None,
) -> str:
  """Makes a released checkpoint of a workdir; returns what to say."""
  config, params, step = workdirs.read(workdir, step)
  layout = format or _only_format(config)
  with _appears(checkpoint) as made:
    made.mkdir()
    released.save(
      made,
      config,
      params,
      layout,
      max_positions=config.data.seq_len,
      dtype=dtype,
      max_shard_bytes=max_shard_bytes,
    )
    written = released.load(made, [layout])
    kept = jax.tree.map(lambda leaf: _rounded(leaf, dtype), params)
    proof = _prove((config, kept), written)
  return (
    f'{checkpoint}: step {step} of {workdir}{_note(dtype)} in the format'
    f" '{layout}'; {proof}"
  )


def verify(
  workdir: Path, checkpoint: Path, dtype: str, step: int | None
) -> str:
  """Holds a workdir to a released checkpoint; returns what to say.

  Raises:
    UserError: they are not the same model.
  """
  config, params, step = workdirs.read(workdir, step)
  kept = jax.tree.map(lambda leaf: _rounded(leaf, dtype), params)
  proof = _prove((config, kept), released.load(checkpoint, formats.FORMATS))
  note = _note(dtype)
  return f'step {step} of {workdir}{note} is the model of {checkpoint}; {proof}'


def _prove(ours: tuple[ConfigDict, Any], theirs: tuple[ConfigDict, Any]) -> str:
  """Runs both on random ids in float32; returns how close they are.

  Raises:
    UserError: they are not the same model.
  """
  difference = _difference(ours, theirs)
  if not difference <= _TOLERANCE:  # nor if it is not a number
    raise UserError(
      f'the models differ: their logits by up to {difference:.1e} of the'
      f' largest, above {_TOLERANCE:.0e}, on {_NUM_IDS} random tokens'
    )
  return (
    f'logits equal to {difference:.1e} of the largest on {_NUM_IDS} random'
    ' tokens'
  )


def _difference(
  ours: tuple[ConfigDict, Any], theirs: tuple[ConfigDict, Any]
) -> float:
  """The largest between two models' logits, by their largest logit.

  Raises:
    UserError: the models have different vocabularies.
  """
  sizes = [config.model.vocab_size for config, _ in (ours, theirs)]
  if sizes[0] != sizes[1]:
    raise UserError(
      f'the models differ: vocabularies of {sizes[0]} and {sizes[1]}'
    )
  ids_BL = np.random.default_rng(0).integers(sizes[0], size=_IDS_SHAPE)
  a, b = (
    np.asarray(released.run(config, params, ids_BL.astype(np.int32)))
    for config, params in (ours, theirs)
  )
  return float(abs(a - b).max() / max(abs(b).max(), _SMALLEST))


def _rounded(leaf: np.ndarray, dtype: str) -> np.ndarray:
  return np.asarray(leaf).astype(tensor_writer.DTYPES[dtype]).astype(np.float32)


def _note(dtype: str) -> str:
  return '' if dtype == 'float32' else f', its weights in {dtype},'


def _only_format(config: ConfigDict) -> str:
  """The released format that can say what the model is.

  Raises:
    UserError: none can, and why each cannot; RMoE's is asked first, as its
      linear router is the one that Mixtral has too.
  """
  reasons = []
  for name in ('rmoe', 'cartesian', 'llama'):
    try:
      formats.write(config, name)
      return name
    except UserError as error:
      reasons.append(f"'{name}': {error}")
  raise UserError(f'no released format has this model; {"; ".join(reasons)}')


@contextmanager
def _appears(path: Path) -> Iterator[Path]:
  """A place beside `path` to write to; it becomes `path` if all goes well.

  Raises:
    UserError: there is something at `path`, or nothing can be written there.
  """
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f'{path} is there already; name a new folder')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      dir=path.parent, prefix=f'.{path.name}.'
    ) as folder:
      made = Path(folder) / path.name
      yield made
      os.replace(made, path)
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}') from error
