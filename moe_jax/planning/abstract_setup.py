"""Setups to plan with: the shapes of a run on any devices, here or not."""

import copy
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from moe_jax import config as config_lib
from moe_jax.data import tokenizers
from moe_jax.model import implementations
from moe_jax.model.build import compute_dtype
from moe_jax.parallel import mesh as mesh_lib
from moe_jax.training import state
from moe_jax.training.state import Setup


def make(config: ConfigDict, devices: Sequence[jax.Device]) -> Setup:
  """Returns the setup of a config on all of the devices.

  A data set is read only where `model.vocab_size` leaves V to its vocabulary.

  Raises:
    UserError: Something is wrong with the config on so many devices.
  """
  config_lib.validate(config, len(devices))
  mesh = mesh_lib.from_config(config, devices)
  return state.setup(config, _vocab_size(config), mesh)


def check_slices(config: ConfigDict, devices: Sequence[jax.Device]) -> None:
  """Raises a UserError if `mesh.dcn.*` does not fit the devices' slices."""
  mesh_lib.from_config(config, devices)


def on_one_device(
  config: ConfigDict, device: jax.Device | None = None
) -> Setup:
  """Returns the setup of a config on one device: its shapes are those of any.

  Args:
    config: A validated config, of any mesh.
    device: The device; None stands for the first that jax finds.
  """
  one = mesh_lib.make_mesh(
    dict.fromkeys(mesh_lib.MESH_AXES, 1), [device or jax.devices()[0]]
  )
  return state.setup(config, _vocab_size(config), one)


def resolved(setup: Setup, mesh: dict[str, int]) -> ConfigDict:
  """Returns the config of a setup with what its `auto`s come to on a mesh.

  Args:
    setup: A setup on devices of the mesh's platform, whatever their number.
    mesh: The number of devices along every axis.
  """
  config = copy.deepcopy(setup.config)
  dtype = compute_dtype(config, setup.mesh)
  device = setup.mesh.devices.flat[0]
  config.model.dtype = str(dtype)
  config.moe.exchange = implementations.exchange_name(
    config, mesh, dtype, device
  )
  return config


def _vocab_size(config: ConfigDict) -> int:
  """Returns V, as the config or its tokenizer says it."""
  of_tokenizer = tokenizers.vocab_size(config.data, config.model.vocab_size)
  return config_lib.vocab_size(config, of_tokenizer)
