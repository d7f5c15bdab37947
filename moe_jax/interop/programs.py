"""What the commands of `moe_jax.interop.hf` and `.upcycle` do.

Success is reported only after both sides were read back from the disk and gave
the same logits in float32. What is written appears at its place last, whole.
"""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.interop import (
  formats,
  proof,
  released,
  targets,
  tensor_writer,
  upcycling,
  workdirs,
)
from moe_jax.interop.released_keys import is_file, read_json

_LONGEST = 'max_position_embeddings'


def import_(checkpoint: Path, workdir: Path, tokenizer: str) -> str:
  """Makes a workdir of a released checkpoint; returns what to say."""
  layout, _ = formats.read(checkpoint)
  workdirs.check_tokenizer(tokenizer)
  targets.check(workdir)
  sections, params = released.load(checkpoint)
  longest = read_json(checkpoint / 'config.json').get(_LONGEST)
  config = workdirs.full_config(sections, tokenizer, longest)
  with targets.appears(workdir) as made:
    with targets.writing(workdir):
      workdirs.write(made, config, params, dictionary=None)
    equal = proof.prove(workdirs.read(made, None)[:2], (sections, params))
  said = f'{workdir}: the model of {checkpoint} ({layout}); {equal}'
  return said + workdirs.other_ids(config)


def export(
  workdir: Path,
  checkpoint: Path,
  format: str | None,
  dtype: str,
  max_shard_bytes: int,
  step: int | None,
) -> str:
  """Makes a released checkpoint of a workdir; returns what to say."""
  workdirs.config_of(workdir)
  targets.check(checkpoint)
  config, params, step = workdirs.read(workdir, step)
  layout = format or _only_format(config)
  with targets.appears(checkpoint) as made:
    with targets.writing(checkpoint):
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
    equal = proof.prove((config, kept), written)
  said = (
    f'{checkpoint}: step {step} of {workdir}{_note(dtype)} in the format'
    f" '{layout}'; {equal}"
  )
  caveat = formats.FORMATS[layout].caveat(config)
  return f'{said}\n  {caveat}' if caveat else said


def verify(
  workdir: Path, checkpoint: Path, dtype: str, step: int | None
) -> str:
  """Holds a workdir to a released checkpoint; returns what to say.

  Raises:
    UserError: they are not the same model.
  """
  config, params, step = workdirs.read(workdir, step)
  kept = jax.tree.map(lambda leaf: _rounded(leaf, dtype), params)
  equal = proof.prove(
    (config, kept), released.load(checkpoint, formats.FORMATS)
  )
  note = _note(dtype)
  return f'step {step} of {workdir}{note} is the model of {checkpoint}; {equal}'


def upcycle(dense: Path, config: ConfigDict, workdir: Path) -> str:
  """Begins a workdir of `config` from a dense model; returns what to say.

  Raises:
    UserError: besides mistakes, logits that differ by more than rounding may
      make of a start that is exact.
  """
  targets.check(workdir)
  config_lib.validate(config, jax.device_count())
  theirs = _either(dense)
  whole = workdirs.with_vocabulary(config)
  params = upcycling.upcycle(
    *theirs, whole, workdirs.initial(whole), released.abstract(whole)[1]
  )
  reasons = upcycling.inexact(whole, theirs[0].model.ffn_width)
  difference = proof.difference((whole, params), theirs)
  rounding = proof.rounding(whole)
  if not reasons and not difference <= rounding:  # nor if it is not a number
    raise UserError(
      f'{workdir} is not made: its logits would differ from those of {dense}'
      f' by {difference:.1e} of the largest, and rounding in float32 explains'
      f' {rounding:.1e}'
    )
  # Training there makes sure that its data has these ids.
  dictionary = workdirs.dictionary(dense) if _is_run(dense) else None
  with targets.appears(workdir) as made, targets.writing(workdir):
    workdirs.write(made, config, params, dictionary)
  start = 'not exactly' if reasons else 'exactly'
  said = (
    f'{workdir}: starts as {start} the model of {dense}; logits differ by'
    f' {difference:.1e} of the largest on random tokens'
  )
  return '\n'.join([said, *(f'  because {reason}' for reason in reasons)])


def _either(directory: Path) -> proof.Model:
  """The model of a workdir or of a released checkpoint."""
  if _is_run(directory):
    return workdirs.read(directory, None)[:2]
  return released.load(directory, formats.FORMATS)


def _is_run(directory: Path) -> bool:
  path = directory / 'config.json'
  return is_file(path) and 'router' in read_json(path)


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
