"""The commands import, export, verify and upcycle.

Success is reported only after both sides were read back from the disk and gave
the same logits in float32. What is written appears at its place last, whole.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax import disk, strict_json
from moe_jax.data.tokenizers import ByteTokenizer, Tokenizer
from moe_jax.errors import UserError
from moe_jax.files import refuse_pattern
from moe_jax.interop import checkpoint as checkpoint_lib
from moe_jax.interop import formats, released, safetensors, tokenizer_files
from moe_jax.interop import upcycle as upcycle_lib
from moe_jax.interop import verify as verify_lib
from moe_jax.interop.formats.base import read_json

_LONGEST = 'max_position_embeddings'


def import_(checkpoint: Path, workdir: Path, tokenizer: str | None) -> str:
  """Makes a workdir of a released checkpoint; returns the report.

  Args:
    checkpoint: The folder of the released checkpoint.
    workdir: The directory of the run, which must not be there.
    tokenizer: The `data.tokenizer` of the run's config; None for the tokenizer
      in the folder, or `bytes` where there is none.

  Raises:
    UserError: The checkpoint cannot be read, or the workdir not be written.
  """
  format, described = formats.read(checkpoint)
  told = ''
  if tokenizer is None:
    tokenizer, told = _own_tokenizer(checkpoint, described.model.vocab_size)
  checkpoint_lib.check_tokenizer(tokenizer)
  refuse_pattern('workdir', str(workdir))
  check_output(workdir)
  sections, params = released.load(checkpoint)
  longest = read_json(checkpoint / 'config.json').get(_LONGEST)
  config = checkpoint_lib.full_config(sections, tokenizer, longest)
  with output_dir(workdir) as aside:
    with writing(workdir):
      checkpoint_lib.write_run(aside, config, params)
    equal = verify_lib.assert_equal(
      checkpoint_lib.read_run(aside).model, (sections, params)
    )
  report = f'{workdir}: the model of {checkpoint} ({format}); {equal}'
  return report + (told or checkpoint_lib.other_ids(config))


def _own_tokenizer(checkpoint: Path, vocab_size: int) -> tuple[str, str]:
  """Returns the `data.tokenizer` of a folder, and what is told of it.

  Raises:
    UserError: The file is damaged, or has more ids than the model.
  """
  own = tokenizer_files.read(checkpoint)
  if own is None:
    return 'bytes', ''
  path = checkpoint / own.file_name
  added = '' if own.has_eos else f', counting the {own.eos} that it lacks,'
  sizes = f'{path} has {own.vocab_size} ids{added} and the model {vocab_size}'
  if own.vocab_size > vocab_size:
    raise UserError(
      f'{sizes}; --tokenizer=PATH names one that fits, and --tokenizer=bytes'
      ' imports the model without its own'
    )
  of_bytes = own.content == tokenizer_files.of_bytes()
  name = 'bytes' if of_bytes else str(path)
  return name, f'\n  data.tokenizer = {name!r}: {sizes}'


def export(
  workdir: Path,
  checkpoint: Path,
  format: str | None,
  dtype: str,
  max_shard_bytes: int,
  step: int | None,
) -> str:
  """Makes a released checkpoint of a workdir; returns the report.

  Args:
    workdir: The directory of the run.
    checkpoint: The folder of the released checkpoint, which must not be there.
    format: A name of `formats.FORMATS`; None for the first that fits.
    dtype: The dtype of the tensors, a name of `safetensors.DTYPES`.
    max_shard_bytes: The most bytes of one file; 0 for a single file.
    step: The step of the run's checkpoint; None for the newest.

  Raises:
    UserError: The run cannot be read, the format cannot say what its model is,
      or the checkpoint cannot be written.
  """
  checkpoint_lib.run_config(workdir)
  check_output(checkpoint)
  read = checkpoint_lib.read_run(workdir, step)
  (config, params), step = read.model, read.step
  format = format or _first_format(config)
  with output_dir(checkpoint) as aside:
    with writing(checkpoint):
      aside.mkdir()
      released.save(
        aside,
        config,
        params,
        format,
        max_positions=config.data.seq_len,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
      )
      tokenizer = _export_tokenizer(aside, read)
    written = released.load(aside, [format])
    equal = verify_lib.assert_equal((config, _rounded(params, dtype)), written)
  report = (
    f'{checkpoint}: step {step} of {workdir}{_note(dtype)} in the format'
    f" '{format}'; {equal}\n  {tokenizer}"
  )
  runs = formats.FORMATS[format].runs(config)
  if format == 'rmoe' and not _obstacle(config, 'mixtral'):
    runs += '; what --format=mixtral writes, they do'
  return f'{report}\n  {runs}'


def _export_tokenizer(folder: Path, read: checkpoint_lib.Checkpoint) -> str:
  """Writes the files of the run's tokenizer; returns what is told of them."""
  config = read.config
  told = f'data.tokenizer = {config.data.tokenizer!r}'
  tokenizer: Tokenizer | None = read.tokenizer
  if config.data.tokenizer == 'bytes':
    tokenizer = ByteTokenizer()
    if config.model.vocab_size != tokenizer.vocab_size:
      return (
        f'no tokenizer is written: {told} has {tokenizer.vocab_size} ids and'
        f' the model {config.model.vocab_size}, so its own may be another'
      )
  name = ''
  if tokenizer is not None:
    name = tokenizer_files.write(folder, tokenizer, config.data.seq_len)
  if tokenizer is None or not name:
    return f'no tokenizer is written: {told} is none that transformers has'
  # Classes of models have ids of their own where config.json has none.
  path = folder / 'config.json'
  values = read_json(path) | tokenizer_files.special_ids(tokenizer)
  path.write_text(strict_json.dumps(values, indent=2) + '\n', 'utf-8')
  return f'{name} is what AutoTokenizer reads: {told}'


def verify(
  workdir: Path, checkpoint: Path, dtype: str, step: int | None
) -> str:
  """Holds a workdir to a released checkpoint; returns the report.

  Args:
    workdir: The directory of the run.
    checkpoint: The folder of the released checkpoint.
    dtype: The dtype in which the checkpoint was written.
    step: The step of the run's checkpoint; None for the newest.

  Raises:
    UserError: They are not the same model.
  """
  read = checkpoint_lib.read_run(workdir, step)
  (config, params), step = read.model, read.step
  equal = verify_lib.assert_equal(
    (config, _rounded(params, dtype)),
    released.load(checkpoint, formats.FORMATS),
  )
  note = _note(dtype)
  return f'step {step} of {workdir}{note} is the model of {checkpoint}; {equal}'


def upcycle(dense: Path, config: ConfigDict, workdir: Path) -> str:
  """Begins a workdir of `config` from a dense model; returns the report.

  Args:
    dense: The workdir or the released checkpoint of the dense model.
    config: The config of the model with experts.
    workdir: The directory of the new run, which must not be there.

  Raises:
    UserError: Besides mistakes, logits differ by more than rounding may make
      of a start that is exact.
  """
  refuse_pattern('workdir', str(workdir))
  check_output(workdir)
  config_lib.validate(config, jax.device_count())
  source = checkpoint_lib.read(dense).model
  whole = checkpoint_lib.with_vocab_size(config)
  with whole.unlocked():
    whole.model.vocab_multiple = 1  # writing the run adds the padding
  params = _upcycled(*source, whole)
  reasons = upcycle_lib.inexact(whole, source[0].model.ffn_width)
  difference = verify_lib.difference((whole, params), source)
  rounding = verify_lib.rounding(whole)
  if not reasons and not difference <= rounding:  # nor if it is not a number
    raise UserError(
      f'{workdir} is not made: its logits would differ from those of {dense}'
      f' by {difference:.1e} of the largest, and rounding in float32 explains'
      f' {rounding:.1e}'
    )
  # Training there makes sure that its data has these ids.
  of_run = checkpoint_lib.is_run(dense)
  vocabulary = checkpoint_lib.vocabulary(dense) if of_run else None
  with output_dir(workdir) as aside, writing(workdir):
    checkpoint_lib.write_run(aside, config, params, vocabulary)
  start = 'not exactly' if reasons else 'exactly'
  report = (
    f'{workdir}: starts as {start} the model of {dense}; logits differ by'
    f' {difference:.1e} of the largest on random tokens'
  )
  return '\n'.join([report, *(f'  because {reason}' for reason in reasons)])


def _upcycled(
  dense_config: ConfigDict, dense_params: Mapping[str, Any], config: ConfigDict
) -> dict[str, Any]:
  """Returns the nested dict of parameters that compute the dense model."""
  params = upcycle_lib.upcycle(
    dense_config,
    traverse_util.flatten_dict(dict(dense_params)),
    config,
    traverse_util.flatten_dict(checkpoint_lib.initial_params(config)),
  )
  return traverse_util.unflatten_dict(params)


def check_output(path: Path) -> None:
  """Refuses a place to write to before anything is read or computed for it.

  Raises:
    UserError: There is something at `path`, or nothing can be written there.
  """
  with writing(path):
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
      raise UserError(f'{path} is there already; name a new folder')
    above = next(p for p in path.absolute().parents if p.exists())
    with tempfile.TemporaryFile(dir=above):
      pass


@contextmanager
def output_dir(path: Path) -> Iterator[Path]:
  """Yields a place beside `path`, which becomes `path` if all goes well.

  Raises:
    UserError: Nothing can be written there.
  """
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.TemporaryDirectory(
      dir=path.parent, prefix=f'.{path.name}.'
    )
  with temporary as folder:
    aside = Path(folder) / path.name
    yield aside
    with writing(path):
      os.replace(aside, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
  """Reports what the disk refuses inside as `path` that cannot be written.

  What is read meanwhile stays outside: an error is of the path that failed.
  """
  try:
    yield
  except OSError as error:
    raise disk.refused(str(path), error) from error


def _rounded(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """Returns parameters, float32, as a file of that dtype holds them."""
  return jax.tree.map(
    lambda leaf: (
      np.asarray(leaf).astype(safetensors.DTYPES[dtype]).astype(np.float32)
    ),
    dict(params),
  )


def _note(dtype: str) -> str:
  return '' if dtype == 'float32' else f', its weights in {dtype},'


def _first_format(config: ConfigDict) -> str:
  """Returns the first released format that can say what the model is.

  RMoE's is asked first, as its linear router is the one that Mixtral has too.

  Raises:
    UserError: No format can; the message says why each cannot.
  """
  reasons = []
  for name in ('rmoe', 'cartesian', 'llama'):
    obstacle = _obstacle(config, name)
    if not obstacle:
      return name
    reasons.append(f"'{name}': {obstacle}")
  raise UserError(
    'no released format has this model, and nothing but moe_jax runs it;'
    f' {"; ".join(reasons)}'
  )


def _obstacle(config: ConfigDict, format: str) -> str:
  """Returns why a format cannot say what a model is; '' if it can."""
  try:
    formats.write(config, format)
  except UserError as error:
    return str(error)
  return ''
