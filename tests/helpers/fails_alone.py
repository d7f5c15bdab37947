"""One of two processes fails, and the other waits: see test_lost_peers.py."""

import sys
import time

from moe_jax import cli
from moe_jax.errors import UserError
from moe_jax.parallel import launch

ERRORS = {'mistake': UserError('no disk'), 'bug': KeyError('of ours')}


def run() -> None:
  error, failing, *flags = sys.argv[1:]
  values = dict(flag.removeprefix('--').split('=') for flag in flags)
  place = {name: int(values[name]) for name in ('num_processes', 'process_id')}
  with launch.joined(values['coordinator'], **place):
    if values['process_id'] == failing:
      raise ERRORS[error]
    time.sleep(300)


if __name__ == '__main__':
  cli.exit_with(run)
