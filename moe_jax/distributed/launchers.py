"""What launchers and clusters leave in the environment of a process."""

import importlib.util
import os
import sys
from typing import NamedTuple

import jax

# Variables with the number of processes and one's own, of launchers in the
# order in which they may be nested.
_LAUNCHERS = {
  'Open MPI': ('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK'),
  'SLURM': ('SLURM_STEP_NUM_TASKS', 'SLURM_PROCID'),
  'MPI': ('PMI_SIZE', 'PMI_RANK'),
}
# Without one of these jax cannot tell where such processes meet; Open MPI has
# not set it since its version 5.
_MEETING = {
  'Open MPI': 'OMPI_MCA_orte_hnp_uri',
  'SLURM': 'SLURM_STEP_NODELIST',
}
_KUBERNETES = 'JOB_COMPLETION_INDEX'


class Launched(NamedTuple):
  """One process of several that a launcher started.

  Attributes:
    launcher: its name.
    count: of the processes.
    id: of this one.
    can_meet: whether jax finds out where.
  """

  launcher: str
  count: int
  id: int
  can_meet: bool


def launched() -> Launched | None:
  """What the launcher of this process says; None if it started only one."""
  for name, (count, rank) in _LAUNCHERS.items():
    if int(os.environ.get(count, 1)) > 1 and rank in os.environ:
      return Launched(
        name,
        int(os.environ[count]),
        int(os.environ[rank]),
        _MEETING.get(name, '') in os.environ,
      )
  return None


def is_pod() -> bool:
  """Whether this is a pod of an indexed Kubernetes job that jax can read."""
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
  """Whether jax has found TPUs, and may be asked for their other hosts."""
  # On a TPU's host jax sets this when it is imported.
  platforms = jax.config.jax_platforms or ''
  known = 'TPU_WORKER_HOSTNAMES' in os.environ
  return platforms.startswith('tpu') and (
    known or 'TPU_SKIP_MDS_QUERY' not in os.environ
  )
