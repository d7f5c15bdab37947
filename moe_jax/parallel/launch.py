"""Joins the processes of one run, started by hand, by a cluster, or alone.

The environment that launchers and clusters leave to a process says whether
there are others; jax itself knows how they find each other there.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from moe_jax import runtime
from moe_jax.errors import UserError
from moe_jax.parallel import peers

_BY_HAND = 'give --coordinator=HOST:PORT, a free port of the host of process 0'
# Processes end a run within seconds of each other, or one of them has failed.
_SHUTDOWN_SECONDS = 60
# The variables in which a launcher leaves the number of processes and that of
# this one; the launchers stand in the order in which they may be nested.
_LAUNCHERS = {
  'Open MPI': ('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK'),
  'SLURM': ('SLURM_STEP_NUM_TASKS', 'SLURM_PROCID'),
  'MPI': ('PMI_SIZE', 'PMI_RANK'),
}
# Without this variable jax cannot tell where the processes meet; Open MPI has
# not set it since its version 5.
_MEETING = {
  'Open MPI': 'OMPI_MCA_orte_hnp_uri',
  'SLURM': 'SLURM_STEP_NODELIST',
}
_KUBERNETES = 'JOB_COMPLETION_INDEX'


@dataclasses.dataclass(frozen=True)
class Place:
  """One process among `count`, which meet at `coordinator`, HOST:PORT."""

  coordinator: str
  count: int
  id: int


@dataclasses.dataclass(frozen=True)
class LaunchedProcess:
  """One process of several that a launcher started.

  Attributes:
    launcher: The launcher's name.
    count: The number of processes it started.
    id: The number of this process, from 0 on.
    can_meet: Whether jax finds out where the processes meet.
  """

  launcher: str
  count: int
  id: int
  can_meet: bool


@contextlib.contextmanager
def joined(coordinator: str | None = None, **place: Any) -> Iterator[None]:
  """As a context, joins the other processes of this run, and watches them.

  Where one of them has gone, this process says which and ends, with status 75.

  Args:
    coordinator: As `initialize` takes it.
    **place: The other arguments of `initialize`.

  Raises:
    UserError: As `initialize` does.
  """
  initialize(coordinator, **place)
  if jax.process_count() > 1 and runtime.keeps_compiled_here():
    # XLA's processes each time some kernels, and wait for each other's times:
    # forever, if one has found its program in a folder of its own host.
    jax.config.update('jax_compilation_cache_dir', None)
  with peers.watched(_host(coordinator) if coordinator else None):
    yield


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  coordinator_timeout: int = 300,
  preemption: bool = False,
) -> None:
  """Joins the other processes of this run, if there are any.

  It is called before jax touches a device.

  Args:
    coordinator: HOST:PORT of process 0. None means that the cluster says it, or
      that this process runs alone.
    num_processes: The number of processes. None means what the launcher says.
    process_id: The number of this process, from 0 on. None means what the
      launcher says.
    coordinator_timeout: How many seconds to wait for the others. After that the
      program ends with one line and exit status 2.
    preemption: Whether the training loop is going to handle SIGTERM; until it
      does, SIGTERM is only remembered.

  Raises:
    UserError: The arguments do not go together, or the others cannot be found.
  """
  _check_encryption()
  jax.config.update('jax_enable_preemption_service', preemption)
  launched = launched_process()
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
      **_bind(place.coordinator),
    )
  elif launched is not None:
    if not launched.can_meet:
      raise UserError(
        f'{launched.launcher} started {launched.count} processes and does not'
        f' say where they meet; {_BY_HAND}'
      )
    _join(coordinator_timeout)
  elif is_pod():
    _join(coordinator_timeout)
  elif is_tpu():
    _join(coordinator_timeout, optional=True)


def _place(
  coordinator: str,
  count: int | None,
  id: int | None,
  launched: LaunchedProcess | None,
) -> Place:
  """Returns what the flags say, completed by the launcher, and checked."""
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


def _host(coordinator: str) -> str:
  return coordinator.rpartition(':')[0].strip('[]')


def _bind(coordinator: str) -> dict[str, Any]:
  """Returns where the coordinator listens, if not at all addresses.

  Nobody is authenticated there; so on one machine, other machines are kept out.
  """
  chosen = 'JAX_COORDINATOR_BIND_ADDRESS' in os.environ
  if chosen or not peers.is_loopback(_host(coordinator)):
    return {}
  return {'coordinator_bind_address': coordinator}


def _check_encryption() -> None:
  """Refuses certificates that this version of jax would not use."""
  prefixes = ('JAX_MTLS_', 'JAX_DISTRIBUTED_VERIFY_SECURE_CREDENTIALS')
  asked = sorted(name for name in os.environ if name.startswith(prefixes))
  known = inspect.signature(jax.distributed.initialize).parameters
  if asked and 'mtls_cert_file' not in known:
    raise UserError(
      f'{", ".join(asked)} would have no effect: jax {jax.__version__} cannot'
      ' encrypt its connections; take one whose jax.distributed.initialize has'
      ' mtls_cert_file, as 0.12 does, or unset the variables on a trusted'
      ' network'
    )


def _check_port(place: Place, seconds: int) -> None:
  """Makes sure that the coordinator's port can be opened, or reached.

  jax would not raise an exception but abort.
  """
  host, port = _host(place.coordinator), place.coordinator.rpartition(':')[2]
  if place.id:
    _reach(host, int(port), seconds)
    return
  try:
    peers.listen(host if _bind(place.coordinator) else '', int(port)).close()
  except OSError as error:
    raise UserError(
      f'--coordinator = {place.coordinator}: process 0 cannot open port {port}'
      f' on its host ({error}); choose another port'
    ) from error


def _reach(host: str, port: int, seconds: int) -> None:
  """Waits until a process listens at `host`:`port`."""
  deadline = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection((host, port), 5).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
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
    seconds: How long to wait for the other processes.
    detect: Whether jax may detect the cluster for what is not given.
    optional: Whether jax may find that there are no other processes.
    **given: Arguments of `jax.distributed.initialize`.
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


def launched_process() -> LaunchedProcess | None:
  """Returns what this process's launcher says; None if it started only one."""
  for name, (count, rank) in _LAUNCHERS.items():
    if int(os.environ.get(count, 1)) > 1 and rank in os.environ:
      return LaunchedProcess(
        name,
        int(os.environ[count]),
        int(os.environ[rank]),
        _MEETING.get(name, '') in os.environ,
      )
  return None


def is_pod() -> bool:
  """Returns whether jax can read the indexed Kubernetes job of this pod."""
  if _KUBERNETES not in os.environ:
    return False
  if importlib.util.find_spec('kubernetes'):
    return True
  print(
    f'note: pod {os.environ[_KUBERNETES]} of an indexed job runs alone; to join'
    " the others install 'jax[k8s]', or give --coordinator, --num_processes"
    ' and --process_id',
    file=sys.stderr,
  )
  return False


def is_tpu() -> bool:
  """Returns whether jax has found TPUs, and can find their other hosts."""
  # On a TPU's host jax sets this when it is imported.
  # jax makes the attribute at run time.
  platforms = jax.config.jax_platforms or ''  # type: ignore[attr-defined]
  known = 'TPU_WORKER_HOSTNAMES' in os.environ
  return platforms.startswith('tpu') and (
    known or 'TPU_SKIP_MDS_QUERY' not in os.environ
  )
