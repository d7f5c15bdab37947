"""The tokenizer of a run, which keeps a copy of the file that it is."""

import os
import sys

from ml_collections import ConfigDict

from moe_jax import files
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
  path, kept, saved = config.data.tokenizer, *_kept(workdir)
  if not kept or not files.tokenizer_file(path):
    return tokenizers.build(config.data)
  own = subwords.load(kept, 'the tokenizer of the run')
  if not os.path.exists(files.expand(path)):
    return own
  given = subwords.load(path)
  if given.fingerprint == own.fingerprint:
    return own
  if path != saved:
    raise UserError(
      f'data.tokenizer = {path!r} is {given.name}, and the run in {workdir} has'
      f' {own.name}, {kept}: leave data.tokenizer as it was, or give another'
      ' --workdir'
    )
  if multihost.is_main_process():
    print(
      f'data.tokenizer = {path!r} is {given.name} now; the run has {own.name}'
      f' and reads its own copy, {kept}',
      file=sys.stderr,
    )
  return own


def _kept(workdir: str) -> tuple[str, str]:
  """Returns the copy and the file that it was made of; '' without one."""
  if not workdir or not os.path.isfile(run_dir.config_path(workdir)):
    return '', ''
  saved = str(run_dir.config_of(workdir)['data']['tokenizer'])
  name = files.tokenizer_file(saved)
  kept = os.path.join(workdir, name)
  return (kept, saved) if name and os.path.isfile(kept) else ('', '')
