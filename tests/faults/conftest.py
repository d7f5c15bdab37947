"""What runs survive: a server that they are forked from."""

import pytest

from tests.helpers.forks import Server


@pytest.fixture(scope='module')
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
  """Starts runs that share what they compile."""
  return Server(
    JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp('compiled')),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES='-1',
  )
