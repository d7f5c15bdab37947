"""How a process learns of the others: by flags, a launcher, or not at all."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_jax.errors import UserError
from moe_jax.parallel import launch

ROOT = Path(__file__).parents[2]
SRUN = {
  'SLURM_JOB_ID': '77',
  'SLURM_STEP_NODELIST': 'node[3-4]',
  'SLURM_NTASKS': '2',
  'SLURM_STEP_NUM_TASKS': '2',
  'SLURM_PROCID': '1',
  'SLURM_LOCALID': '0',
}
MPIRUN = {'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '2'}
OLD_MPIRUN = MPIRUN | {
  'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1:1'
}


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
  """No variables of any cluster."""
  for name in os.environ:
    if name.startswith(('SLURM', 'OMPI', 'PMI', 'TPU', 'KUBER', 'JOB_')):
      monkeypatch.delenv(name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
  """What `jax.distributed.initialize` was called with, which does nothing."""
  found: list[dict[str, Any]] = []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda **given: found.append(given)
  )
  return found


def place(call: dict[str, Any]) -> tuple[str, int, int]:
  names = ('coordinator_address', 'num_processes', 'process_id')
  return tuple(call.get(name) for name in names)


ALONE = {
  'a laptop': {},
  'srun of one task': SRUN | {'SLURM_STEP_NUM_TASKS': '1'},
  # An interactive shell in an allocation of two tasks is one of them.
  'a shell in an allocation': {'SLURM_JOB_ID': '77', 'SLURM_NTASKS': '2'},
  'mpirun of one': {'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_COMM_WORLD_RANK': '0'},
  'a pod': {'KUBERNETES_SERVICE_HOST': '10.0.0.1'},
}


def program(code: str) -> subprocess.CompletedProcess[str]:
  """Runs code in a process of its own, on the CPU."""
  return subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


@pytest.mark.parametrize('name', ALONE)
def test_joins_nobody_where_there_is_nobody(
  name: str, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
  for variable, value in ALONE[name].items():
    monkeypatch.setenv(variable, value)
  launch.initialize()
  assert not calls


@pytest.mark.parametrize('environment', [SRUN, OLD_MPIRUN])
def test_jax_joins_what_a_launcher_started(
  environment: dict[str, str],
  calls: list[dict[str, Any]],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  for variable, value in environment.items():
    monkeypatch.setenv(variable, value)
  launch.initialize()
  (call,) = calls
  assert place(call) == (None, None, None)
  assert call['cluster_detection_method'] is None


def test_flags_say_all(calls: list[dict[str, Any]]) -> None:
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
    launch.initialize(address, num_processes=2, process_id=1)
  (call,) = calls
  assert place(call) == (address, 2, 1)
  assert call['cluster_detection_method'] == 'deactivate'


def test_a_launcher_completes_the_flags(
  calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
  for variable, value in MPIRUN.items():
    monkeypatch.setenv(variable, value)
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
    launch.initialize(address)
  (call,) = calls
  assert place(call) == (address, 4, 2)
  # jax then finds which devices of the host are this process's.
  assert call['cluster_detection_method'] is None


def test_a_tpu_host_without_others_is_alone(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  def initialize(**given: object) -> None:
    del given
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  monkeypatch.setattr(launch, 'is_tpu', lambda: True)
  launch.initialize()


@pytest.mark.parametrize(
  ('environment', 'given', 'fragments'),
  [
    (MPIRUN, {}, ['Open MPI started 4 processes', '--coordinator=HOST:PORT']),
    ({}, {'num_processes': 2}, ['--num_processes = 2', 'need --coordinator']),
    ({}, {'process_id': 0}, ['--process_id = 0', 'need --coordinator']),
    ({}, {'coordinator': 'a:1'}, ['needs --num_processes and --process_id']),
    (
      {},
      {'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2},
      ['--process_id = 2', 'below --num_processes = 2'],
    ),
    (
      {},
      {'coordinator': 'node3', 'num_processes': 2, 'process_id': 0},
      ["'node3' is not HOST:PORT"],
    ),
    (
      {},
      {'coordinator': 'node3:65536', 'num_processes': 2, 'process_id': 0},
      ["'node3:65536' is not HOST:PORT"],
    ),
    (
      {},
      {
        'coordinator': '127.0.0.1:1',
        'num_processes': 2,
        'process_id': 1,
        'coordinator_timeout': 0,
      },
      ['127.0.0.1:1 could not be reached within 0 seconds', 'process 0'],
    ),
  ],
)
def test_refuses_half_a_place(
  environment: dict[str, str],
  given: dict[str, Any],
  fragments: list[str],
  calls: list[dict[str, Any]],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  for variable, value in environment.items():
    monkeypatch.setenv(variable, value)
  with pytest.raises(UserError) as error:
    launch.initialize(**given)
  for fragment in fragments:
    assert fragment in str(error.value)
  assert not calls


def test_refuses_a_port_that_is_taken(calls: list[dict[str, Any]]) -> None:
  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(UserError, match=f'process 0 cannot open port {port}'):
      launch.initialize(f'127.0.0.1:{port}', num_processes=2, process_id=0)
  assert not calls


def test_says_what_jax_could_not_find(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  def initialize(**given: object) -> None:
    del given
    raise RuntimeError('Could not parse coordinator IP address')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  for variable, value in OLD_MPIRUN.items():
    monkeypatch.setenv(variable, value)
  with pytest.raises(UserError, match='cannot be joined: Could not parse'):
    launch.initialize()


@pytest.mark.parametrize('extra', [True, False])
def test_a_pod_of_an_indexed_job_joins_the_others_if_jax_can_read_it(
  extra: bool,
  calls: list[dict[str, Any]],
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.setenv('JOB_COMPLETION_INDEX', '3')
  monkeypatch.setattr(
    'importlib.util.find_spec', lambda name: object() if extra else None
  )
  launch.initialize()
  assert bool(calls) == extra
  assert ('pod 3 of an indexed job runs alone' in capsys.readouterr().err) != (
    extra
  )


def test_who_waits_in_vain_is_told_in_one_line() -> None:
  """A program of its own: jax itself would abort."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
    code = (
      'from moe_jax.parallel import launch;'
      f'launch.initialize({address!r}, 2, 1, coordinator_timeout=1)'
    )
    done = program(code)
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: not all processes of this run came together')
  assert 'within 1 seconds (--coordinator_timeout)' in line


@pytest.mark.parametrize(
  ('host', 'bound'),
  [
    ('localhost', True),
    ('127.0.0.1', True),
    ('[::1]', True),
    ('node3', False),
    ('10.0.0.1', False),
  ],
)
def test_a_loopback_name_keeps_other_machines_out(
  host: str, bound: bool, calls: list[dict[str, Any]]
) -> None:
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
  launch.initialize(f'{host}:{port}', num_processes=2, process_id=0)
  (call,) = calls
  address = f'{host}:{port}' if bound else None
  assert call.get('coordinator_bind_address') == address


def test_where_the_coordinator_listens_may_be_chosen(
  calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('JAX_COORDINATOR_BIND_ADDRESS', '0.0.0.0:1234')
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
  launch.initialize(f'localhost:{port}', num_processes=2, process_id=0)
  assert 'coordinator_bind_address' not in calls[0]


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize(
  'host', ['localhost', pytest.param('[::1]', marks=pytest.mark.slow)]
)
def test_the_coordinator_listens_on_loopback_alone(host: str) -> None:
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
  code = (
    'import pathlib;'
    'from moe_jax.parallel import launch;'
    f'launch.initialize("{host}:{port}", 1, 0);'
    'print(*pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:],'
    '*pathlib.Path("/proc/net/tcp6").read_text().splitlines()[1:], sep="\\n")'
  )
  done = program(code)
  assert done.returncode == 0, done.stderr
  # The second column is the address in hexadecimal, the fourth the state.
  sockets = [line.split() for line in done.stdout.splitlines()]
  listening = {
    address.split(':')[0]
    for _, address, _, state, *_ in sockets
    if state == '0A' and int(address.split(':')[1], 16) == port
  }
  loopback = {
    '0100007F',
    '00000000000000000000000001000000',
    '0000000000000000FFFF00000100007F',  # 127.0.0.1 as an address of IPv6
  }
  assert listening
  assert listening <= loopback


def test_certificates_that_jax_would_not_use_are_refused(
  calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('JAX_MTLS_CERT_FILE', '/etc/here.pem')
  with pytest.raises(UserError, match='JAX_MTLS_CERT_FILE would have no'):
    launch.initialize()
  assert not calls

  def initialize(mtls_cert_file: str = '', **given: object) -> None:
    del mtls_cert_file
    calls.append(given)

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  launch.initialize()


@pytest.mark.parametrize('count', [1, 2])
@pytest.mark.parametrize('folder', ['moe_jax/compiled', 'shared'])
def test_several_processes_keep_what_is_compiled_only_where_a_user_says(
  count: int,
  folder: str,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Or one would not come to where the others wait for it."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / folder))
  monkeypatch.setattr(launch, 'initialize', lambda *_, **__: None)
  monkeypatch.setattr(jax, 'process_count', lambda: count)
  monkeypatch.setattr(launch.peers, 'watched', contextlib.nullcontext)
  before = jax.config.jax_compilation_cache_dir
  try:
    with launch.joined():
      kept = jax.config.jax_compilation_cache_dir is not None
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
  assert kept == (count == 1 or folder == 'shared')
