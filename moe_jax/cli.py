"""The command line that train.py, eval.py and the other programs share.

A user's mistake becomes one line on stderr and exit status 2; a programming
error keeps its traceback. Nothing here imports jax: the allocator has to be
set before it, and a mistake should be told at once.
"""

import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from moe_jax import runtime
from moe_jax.config import loading
from moe_jax.errors import UserError, nearest

DefineFlags = Callable[[flags.FlagValues], None]


def main(
  run: Callable[..., None],
  define_flags: DefineFlags | None = None,
  workdir: bool = True,
) -> NoReturn:
  """Parses the command line, calls `run` and exits.

  Args:
    run: called with the config, then every other flag by its name: `workdir`
      and those of `define_flags`. It imports jax itself, when called.
    define_flags: defines the flags that only this program has.
    workdir: whether the program takes --workdir, which it then requires.
  """
  try:
    config, values = parse(sys.argv, define_flags, workdir)
    runtime.configure_malloc()
    runtime.silence_libtpu()
    run(config, **values)
    sys.stdout.flush()
  except UserError as error:
    print('error:', ' '.join(str(error).split()), file=sys.stderr)
    sys.exit(2)
  except RuntimeError as error:
    # JAX's, which cannot be imported here.
    said = ' '.join(str(error).split())
    if not said.startswith('Unable to initialize backend'):
      raise
    chosen = os.environ.get('JAX_PLATFORMS', 'not set')
    print(f'error: JAX_PLATFORMS is {chosen}: {said[:300]}', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    sys.exit(130)
  except BrokenPipeError:
    if not _unread():
      raise
    # Python flushes once more at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)
  sys.exit(0)


def _unread() -> bool:
  """Whether the reader of stdout has gone, as `head` does."""
  poll = select.poll()
  poll.register(sys.stdout.fileno(), 0)  # for errors alone
  return bool(poll.poll(0))


def define_process_flags(values: flags.FlagValues) -> None:
  """The flags of programs that several processes run together.

  Their names and meanings are those of `parallel.launch.initialize`.
  """
  for name, about in (
    ('num_processes', 'of this run, on all hosts'),
    ('process_id', 'of this process, from 0 on'),
  ):
    flags.DEFINE_integer(name, None, about, flag_values=values)
  flags.DEFINE_string(
    'coordinator',
    None,
    'HOST:PORT of process 0, where clusters do not say',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'coordinator_timeout',
    300,
    'seconds to wait for the other processes',
    lower_bound=1,
    flag_values=values,
  )


def parse(
  argv: Sequence[str],
  define_flags: DefineFlags | None = None,
  workdir: bool = True,
) -> tuple[ConfigDict, dict[str, Any]]:
  """Returns the config, overridden and locked, and the other flags by name.

  Raises:
    UserError: any mistake on the command line or in the config file.
    SystemExit: --help was given, and answered.
  """
  known = _flags(define_flags, workdir)
  rest = _parse(known, argv, known_only=True)
  values = known.flag_values_dict()
  if values.pop('help'):
    print(sys.modules['__main__'].__doc__)
    print(known.get_help(include_special_flags=False).strip('\n'))
    sys.exit(0)
  for name in ('config', 'workdir'):
    if name in values and not values[name]:
      raise UserError(f'--{name} is missing: {known[name].help}')
  config = loading.load(values.pop('config'))
  _refuse_unknown(rest[1:], [f'--{name}' for name in known])
  return _overridden(config, rest), values


def _flags(define_flags: DefineFlags | None, workdir: bool) -> flags.FlagValues:
  """The flags of a program, all but --config.KEY."""
  values = flags.FlagValues()
  values.set_gnu_getopt(True)  # go on after what only the config will know
  flags.DEFINE_boolean('help', False, 'print this', flag_values=values)
  flags.DEFINE_string(
    'config',
    None,
    'FILE or FILE:preset,variants, such as configs/quickstart.py;'
    ' --config.KEY=VALUE then changes a key',
    flag_values=values,
  )
  if workdir:
    about = 'the directory of the run'
    flags.DEFINE_string('workdir', None, about, flag_values=values)
  if define_flags:
    define_flags(values)
  return values


def _refuse_unknown(arguments: Sequence[str], known: Sequence[str]) -> None:
  """Refuses misspelt flags and config keys, naming the nearest real one."""
  keys = loading.known_keys()
  for argument in arguments:
    override = re.match(r'--?(?:no)?config\.([^=]*)', argument)
    if override and override[1] not in keys:
      raise UserError(loading.unknown_key(override[1], keys))
    flag = re.match(r'--?[A-Za-z][^=]*', argument)
    if flag and not override:
      raise UserError(f'there is no flag {flag[0]}{nearest(flag[0], known)}')


def _overridden(config: ConfigDict, argv: Sequence[str]) -> ConfigDict:
  """`config` with every --config.KEY=VALUE in `argv` carried out."""
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  config_flags.DEFINE_config_dict(
    'config', config, flag_values=values, sys_argv=list(argv)
  )
  rest = _parse(values, argv)
  if rest[1:]:
    raise UserError(f'{rest[1]!r} is not a flag: write --name=value')
  return values['config'].value


def _parse(
  values: flags.FlagValues, argv: Sequence[str], known_only: bool = False
) -> list[str]:
  """Parses `argv` into `values` and returns what it did not use."""
  try:
    return values(argv, known_only=known_only)
  except flags.Error as error:
    raise UserError(str(error)) from error
