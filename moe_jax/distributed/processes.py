"""Joins the processes of one run: told how, started by a cluster, or alone.

Whether there are several is read from what launchers leave in the environment;
how they find each other there is jax's own knowledge.
"""

import os
import re
import socket
import sys
import threading
import time
from typing import Any, NamedTuple

import jax

from moe_jax.distributed import launchers
from moe_jax.errors import UserError

_BY_HAND = 'give --coordinator=HOST:PORT, a free port of the host of process 0'
# Processes end a run within seconds of each other, or one of them has failed.
_SHUTDOWN_SECONDS = 60


class Place(NamedTuple):
  """One process among `count`, which meet at `coordinator`, HOST:PORT."""

  coordinator: str
  count: int
  id: int


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  coordinator_timeout: int = 300,
  preemption: bool = False,
) -> None:
  """Joins the other processes of this run, if there are any.

  To be called before jax touches a device.

  Args:
    coordinator: HOST:PORT of process 0; None: the cluster's, or none.
    num_processes: all there are; None: as many as the launcher says.
    process_id: this one, from 0 on; None: what the launcher says.
    coordinator_timeout: seconds to wait for the others. After them the program
      ends with one line and exit status 2.
    preemption: whether `Interrupt` is going to look after SIGTERM; until it
      does, SIGTERM is only remembered.

  Raises:
    UserError: the arguments do not go together, or the others cannot be found.
  """
  jax.config.update('jax_enable_preemption_service', preemption)
  launched = launchers.launched()
  if coordinator is None and (num_processes, process_id) != (None, None):
    raise UserError(
      f'--num_processes = {num_processes} and --process_id = {process_id} need'
      f' --coordinator too: {_BY_HAND}'
    )
  if coordinator is not None:
    place = _place(coordinator, num_processes, process_id, launched)
    _check_port(place, coordinator_timeout)
    _join(
      coordinator_timeout,
      # A launcher also says which of a host's devices are this process's.
      detect=launched is not None,
      coordinator_address=place.coordinator,
      num_processes=place.count,
      process_id=place.id,
    )
  elif launched is not None:
    if not launched.can_meet:
      raise UserError(
        f'{launched.launcher} started {launched.count} processes and does not'
        f' say where they meet; {_BY_HAND}'
      )
    _join(coordinator_timeout)
  elif launchers.is_pod():
    _join(coordinator_timeout)
  elif launchers.is_tpu():
    _join(coordinator_timeout, optional=True)


def _place(
  coordinator: str,
  count: int | None,
  id: int | None,
  launched: launchers.Launched | None,
) -> Place:
  """The flags, completed by what the launcher says, and checked."""
  if launched and (count, id) == (None, None):
    count, id = launched.count, launched.id
  if count is None or id is None:
    raise UserError(
      f'--coordinator = {coordinator} needs --num_processes and --process_id'
      ' too, but under a launcher that says both (srun, mpirun)'
    )
  port = re.fullmatch(r'.+:(\d{1,5})', coordinator)
  if not port or not 0 < int(port[1]) < 2**16:
    raise UserError(f'--coordinator = {coordinator!r} is not HOST:PORT')
  if not 0 <= id < count:
    raise UserError(
      f'--process_id = {id} must be at least 0 and below --num_processes ='
      f' {count}'
    )
  return Place(coordinator, count, id)


def _check_port(place: Place, seconds: int) -> None:
  """Makes sure that the coordinator's port can be opened, or reached.

  jax would not raise an exception but abort.
  """
  host, _, port = place.coordinator.rpartition(':')
  if place.id:
    _reach(host.strip('[]'), int(port), seconds)
    return
  try:
    socket.create_server(('', int(port))).close()
  except OSError as error:
    raise UserError(
      f'--coordinator = {place.coordinator}: process 0 cannot open port {port}'
      f' on its host ({error}); choose another port'
    ) from error


def _reach(host: str, port: int, seconds: int) -> None:
  """Waits until somebody listens there."""
  give_up = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection((host, port), 5).close()
      return
    except OSError as error:
      if time.monotonic() > give_up:
        raise UserError(
          f'--coordinator = {host}:{port} could not be reached within {seconds}'
          f' seconds ({error}); process 0 has to run on that host'
        ) from error
    time.sleep(0.2)


def _join(
  seconds: int, detect: bool = True, optional: bool = False, **given: Any
) -> None:
  """Calls jax, and ends the program if the others have not come in time.

  Args:
    seconds: to wait.
    detect: whether jax may find out what is not given.
    optional: whether it may find that there are no others.
    **given: to `jax.distributed.initialize`.
  """
  timer = threading.Timer(seconds, _give_up, [seconds])
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **given,
      cluster_detection_method=None if detect else 'deactivate',
      # Ours is the earlier one: after its own jax aborts.
      initialization_timeout=seconds + 60,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except (RuntimeError, OSError, ValueError) as error:
    if optional and isinstance(error, ValueError):
      return
    alone = ', or TPU_SKIP_MDS_QUERY=1 to run alone' if optional else ''
    raise UserError(
      f'the processes of this run cannot be joined: {error}; {_BY_HAND},'
      f' --num_processes and --process_id{alone}'
    ) from error
  finally:
    timer.cancel()


def _give_up(seconds: int) -> None:
  print(
    f'error: not all processes of this run came together within {seconds}'
    ' seconds (--coordinator_timeout); start each with the same --coordinator'
    ' and --num_processes, and see what the others say',
    file=sys.stderr,
    flush=True,
  )
  os._exit(2)  # from a thread; the main one waits inside jax
