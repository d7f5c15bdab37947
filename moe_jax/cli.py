"""The command line that training, evaluation and other programs share.

Nothing here imports jax: the allocator has to be set before it, and a mistake
should be told at once.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

from moe_jax import files, runtime
from moe_jax.config import help as config_help
from moe_jax.config import loading
from moe_jax.config.keys import Value
from moe_jax.config.schema import KEYS
from moe_jax.errors import UserError, nearest
from moe_jax.exits import exit_with

DefineFlags = Callable[[flags.FlagValues], None]

_CONFIG_HELP = (
  'NAME or NAME:preset,variants, such as quickstart or rmoe:enwik8_small,np:'
  ' a file of yours, or one of `moe_jax presets`; may be left out where'
  ' --workdir holds a run; --config.KEY=VALUE then changes a key'
)


class Parser(argparse.ArgumentParser):
  """Reports mistakes as all programs of this library do."""

  def error(self, message: str) -> NoReturn:
    """Raises a mistake on the command line as a user's error."""
    raise UserError(f'{message}; --help says more')


def main(
  run: Callable[..., None],
  define_flags: DefineFlags | None = None,
  workdir: bool = True,
  about: str = '',
) -> NoReturn:
  """Parses the command line, calls `run` and exits.

  Args:
    run: What the program does. It is called with the config, then every other
      flag by its name: `workdir` and those of `define_flags`. It imports jax
      itself, when called.
    define_flags: Defines the flags that only this program has.
    workdir: Whether the program works in --workdir, which it then requires.
      Without, --workdir is only asked for its config where --config is missing.
    about: The program's help; if empty, the docstring of the module of `run`.
  """

  def parse_and_run() -> None:
    told = about or _documented(run)
    _prepare()
    config, values = parse(sys.argv, define_flags, workdir, told)
    run(config, **values)

  exit_with(parse_and_run)


def main_of_runs(
  run: Callable[..., None], define_flags: DefineFlags, one: bool = False
) -> NoReturn:
  """Parses the command line of a program that reads runs, and calls `run`.

  Args:
    run: What the program does. It is called with a dictionary from workdirs to
      the configs of their runs, then every flag by its name; see `main`.
    define_flags: Defines the flags of the program.
    one: As in `parse_runs`.
  """

  def parse_and_run() -> None:
    _prepare()
    about = _documented(run)
    configs, values = parse_runs(sys.argv, define_flags, about, one)
    run(configs, **values)

  exit_with(parse_and_run)


def _prepare() -> None:
  """Sets up the process, before a config of the user's imports jax."""
  runtime.configure_malloc()
  runtime.configure_gpu()
  runtime.silence_plugins()


def _documented(run: Callable[..., None]) -> str:
  """Returns what the module of a program says about it."""
  return sys.modules[run.__module__].__doc__ or ''


def define_process_flags(values: flags.FlagValues) -> None:
  """Defines the flags of programs that several processes run together.

  Their names and meanings are those of `parallel.launch.initialize`.
  """
  for name, about in (
    ('num_processes', 'the processes of this run, on all hosts'),
    ('process_id', 'the number of this process, from 0 on'),
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
  about: str = '',
) -> tuple[ConfigDict, dict[str, Any]]:
  """Returns the config, overridden and locked, and the other flags by name.

  Args:
    argv: The command line, the program's name first.
    define_flags: As in `main`.
    workdir: As in `main`.
    about: What --help says before it lists the flags.

  Raises:
    UserError: Any mistake on the command line or in the config file.
    SystemExit: --help was given, and answered.
  """
  values, overrides = read(argv, define_flags, workdir, about)
  directory = values['workdir']
  config = _config(values.pop('config'), directory)
  if not workdir:
    del values['workdir']
  return _overridden(config, overrides), values


def read(
  argv: Sequence[str],
  define_flags: DefineFlags | None = None,
  workdir: bool = True,
  about: str = '',
) -> tuple[dict[str, Any], dict[str, Value]]:
  """Returns the flags by name, and the keys that --config.KEY=VALUE names.

  The arguments are those of `parse`; the flags `config` and `workdir` are as
  they were given, ~ expanded in the latter, '' where there is none.

  Raises:
    UserError: A flag is unknown or missing, or a key or its value is wrong.
    SystemExit: --help was given, and answered.
  """
  known = _flags(define_flags, workdir)
  _answer_help(argv, known, about)
  rest = _parse(known, argv)
  overrides = _overrides(rest[1:], [f'--{name}' for name in known])
  values = known.flag_values_dict()
  values['workdir'] = files.expand(values['workdir'] or '')
  if workdir:
    _require_workdir(values['workdir'], known)
  return values, dict(overrides)


def parse_runs(
  argv: Sequence[str],
  define_flags: DefineFlags,
  about: str = '',
  one: bool = False,
) -> tuple[dict[str, ConfigDict], dict[str, Any]]:
  """Returns the configs of runs by their workdirs, and the flags by name.

  Args:
    argv: The command line, the program's name first; workdirs are all that is
      no flag.
    define_flags: Defines the flags of the program.
    about: What --help says before it lists the flags.
    one: Whether --workdir may name the run instead, and --config its config.

  Raises:
    UserError: Any mistake on the command line, or a workdir holds no run.
    SystemExit: --help was given, and answered.
  """
  known = _flags(define_flags, workdir=True)
  if not one:
    del known.config, known.workdir
  _answer_help(argv, known, about)
  workdirs: list[str] = []
  rest = _parse(known, argv)[1:]
  overrides = _overrides(rest, [f'--{name}' for name in known], workdirs)
  values = known.flag_values_dict()
  if one:
    named, workdir = values.pop('config'), values.pop('workdir')
    if not workdirs:
      directory = files.expand(workdir or '')
      _require_workdir(directory, known)
      config = _config(named, directory)
      return {directory: _overridden(config, dict(overrides))}, values
    if named or workdir:
      raise UserError(
        f'WORKDIR {workdirs[0]} is given beside'
        f' --{"workdir" if workdir else "config"}: give several runs without'
        ' either'
      )
  if not workdirs:
    raise UserError('a WORKDIR is missing: the directory of a run, or several')
  configs: dict[str, ConfigDict] = {}
  known_runs: set[str] = set()
  for workdir in map(files.expand, workdirs):
    run = os.path.realpath(workdir)
    if run in known_runs:  # named twice, as `a` and `a/`
      continue
    known_runs.add(run)
    if not loading.holds_run(workdir):
      raise UserError(
        f'workdir {workdir} holds no run: there is no'
        f' {os.path.join(workdir, "config.json")}; give the --workdir of a'
        ' training run'
      )
    configs[workdir] = _overridden(loading.of_run(workdir), dict(overrides))
  return configs, values


def _require_workdir(directory: str, known: flags.FlagValues) -> None:
  """Refuses a command line without --workdir."""
  if not directory:
    raise UserError(f'--workdir is missing: {known["workdir"].help}')


def _overridden(config: ConfigDict, overrides: dict[str, Value]) -> ConfigDict:
  """Returns the config with other values of some keys."""
  config.update_from_flattened_dict(overrides)
  return loading.expand_paths(config)


def _flags(define_flags: DefineFlags | None, workdir: bool) -> flags.FlagValues:
  """Returns the flags of a program, all but --config.KEY."""
  values = flags.FlagValues()
  values.set_gnu_getopt(True)  # go on after what only the schema knows
  flags.DEFINE_string(
    'config',
    None,
    _CONFIG_HELP,
    flag_values=values,
  )
  about = 'the directory of the run'
  if not workdir:
    about += ' whose config is taken if --config is left out'
  flags.DEFINE_string('workdir', None, about, flag_values=values)
  if define_flags:
    define_flags(values)
  return values


def _answer_help(
  argv: Sequence[str], known: flags.FlagValues, about: str
) -> None:
  """Answers --help and --help=SECTION, and exits."""
  for argument in argv[1:]:
    asked = re.fullmatch(r'-h|--?help(?:full|short)?(?:=(.*))?', argument)
    if not asked:
      continue
    if asked[1]:
      print(config_help.section(asked[1]))
    else:
      print(f'{about.strip()}\n')
      lines = known.get_help(include_special_flags=False).split('\n')
      # Without the names of the modules that define them.
      print(*[line for line in lines if line.startswith('  ')], sep='\n')
      print(f'\n{config_help.sections()}')
    sys.exit(0)


def _config(argument: str | None, workdir: str) -> ConfigDict:
  """Returns the config that --config names, or else that of the run."""
  if argument:
    return loading.load(argument)
  if workdir and loading.holds_run(workdir):
    return loading.of_run(workdir)
  holds = f', and {workdir} holds no run whose config it could be'
  raise UserError(
    f'--config is missing{holds if workdir else ""}: {_CONFIG_HELP}'
  )


def _overrides(
  arguments: Sequence[str],
  known: Sequence[str],
  positional: list[str] | None = None,
) -> list[tuple[str, Value]]:
  """Returns the keys that --config.KEY=VALUE names, with their values.

  Args:
    arguments: What the flags of the program left.
    known: These flags, to name the nearest to a misspelt one.
    positional: Takes the arguments that are no flags; None refuses them.

  Raises:
    UserError: An argument is no such thing.
  """
  overrides: list[tuple[str, Value]] = []
  rest = iter(arguments)
  for argument in rest:
    override = re.fullmatch(
      r'--?(no)?config\.([^=]*)(?:=(.*))?', argument, re.DOTALL
    )
    if override:
      overrides.append(_override(override, rest))
      continue
    flag = re.match(r'--?[A-Za-z][^=]*', argument)
    if flag:
      raise UserError(f'there is no flag {flag[0]}{nearest(flag[0], known)}')
    if positional is not None:
      positional.append(argument)
      continue
    raise UserError(f'{argument!r} is not a flag: write --name=value')
  return overrides


def _override(
  argument: re.Match[str], rest: Iterator[str]
) -> tuple[str, Value]:
  """Returns the key and the value of --config.KEY=VALUE.

  Args:
    argument: The parts of the argument: 'no' if it is --noconfig.KEY, the key,
      and the value or None.
    rest: The arguments that follow; the first may be the value.
  """
  negated, name, text = argument.groups()
  if name not in KEYS:
    raise UserError(loading.unknown_key(name, loading.known_keys()))
  key = KEYS[name]
  if text is None and isinstance(key.default, bool):
    return name, not negated
  if text is None and not negated:
    text = next(rest, None)
  if text is None or negated:
    raise UserError(f'--config.{name} needs a value: {key.wanted()}')
  return name, key.parse(f'--config.{name}', text)


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
  """Parses `argv` into `values` and returns what it does not know."""
  try:
    return values(argv, known_only=True)
  except flags.Error as error:
    raise UserError(str(error)) from error
