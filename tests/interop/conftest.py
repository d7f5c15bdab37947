"""A released checkpoint to change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.released import RELEASED


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
  """Makes a copy of a checkpoint, with keys of its config changed."""

  def make(name: str, **changes: Any) -> Path:
    folder = tmp_path / name
    shutil.copytree(RELEASED / name, folder)
    values = json.loads((folder / 'config.json').read_text()) | changes
    (folder / 'config.json').write_text(json.dumps(values))
    return folder

  return make
