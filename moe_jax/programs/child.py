"""Runs a program that ends when the process that started it does.

  python -m moe_jax.programs.child PARENT CPUS PROGRAM [FLAG ...]

PARENT is the process that starts it, CPUS are the cores to run on with commas
between, '' for all. The kernel kills this process when that one goes, however
it goes, so nothing trains on unwatched. XLA has a thread for each core that it
sees when it starts.
"""

import ctypes
import os
import signal
import sys

from moe_jax import __main__ as command

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def main() -> None:
  """Binds this process to its parent and cores, then runs the program."""
  parent, cpus, *arguments = sys.argv[1:]
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != int(parent):  # it went before the kernel was told
    sys.exit(1)
  if cpus:
    os.sched_setaffinity(0, map(int, cpus.split(',')))
  sys.argv = ['moe_jax', *arguments]
  command.main()


if __name__ == '__main__':
  main()
