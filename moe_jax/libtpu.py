"""Lets libtpu, TPUs' compiler and driver, be where no TPU is, unnoticed.

JAX asks libtpu for devices wherever it is installed. Without a TPU it looks for
the cloud's metadata, warns on stderr and takes a lock that lets one process of
the machine in. None of that is needed to compile.
"""

import glob
import os

# The two ways in which TPUs appear.
TPUS = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
_QUIET = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_LOG_DIR': 'disabled',
  # Asked for at the start, and not used: any will do.
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


def quiet() -> None:
  """Sets libtpu's environment where there are no TPUs.

  To be called before jax is imported; variables that are set stay as they are.
  """
  if any(glob.glob(pattern) for pattern in TPUS):
    return
  for name, value in _QUIET.items():
    os.environ.setdefault(name, value)
