"""The tokenizer of a run, which keeps a copy of the file that it is."""

import os
import sys

from ml_collections import ConfigDict

from moe_jax import files
from moe_jax.config import saved as saved_config
from moe_jax.data import subwords, tokenizers
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError
from moe_jax.parallel import multihost
from moe_jax.training import run_dir


def build(config: ConfigDict, workdir: str) -> Tokenizer:
  """Returns the tokenizer of a config, as the run in `workdir` knows it.

  The copy of a run is its tokenizer, also where the file is gone or is another
  one now. A config that names another file may: if it has the same content.

  Args:
    config: The config.
    workdir: The directory of the run, which need not exist; '' for none.

  Raises:
    UserError: As `tokenizers.build`; or the config names another tokenizer.
  """
  path, (own, named) = files.expand(config.data.tokenizer), _own(workdir)
  if not own or not files.tokenizer_file(path):
    return tokenizers.build(config.data)
  tokenizer = subwords.load(own, 'the tokenizer of the run')
  if path not in (own, named):
    _check_same(path, tokenizer, f'the run in {workdir}', own)
  elif own != named and os.path.exists(named) and multihost.is_main_process():
    print(
      f'data.tokenizer = {named!r} has changed; the run in {workdir} has'
      f' {tokenizer.name} and reads its own copy, {own}',
      file=sys.stderr,
    )
  return tokenizer


def _own(workdir: str) -> tuple[str, str]:
  """Returns the file of the run, '' without one, and what its config names."""
  if not workdir or not os.path.isfile(run_dir.config_path(workdir)):
    return '', ''
  named = files.expand(str(run_dir.config_of(workdir)['data']['tokenizer']))
  return saved_config.own_tokenizer(workdir, named), named


def _check_same(path: str, own: Tokenizer, run: str, file: str) -> None:
  """Refuses a file that is there and is not the tokenizer of the run."""
  if not os.path.exists(path):
    return
  given = subwords.load(path)
  if given.fingerprint != own.fingerprint:
    raise UserError(
      f'data.tokenizer = {path!r} is {given.name}, and {run} has {own.name},'
      f' {file}: leave data.tokenizer as it was, or give another --workdir'
    )
