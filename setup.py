"""Puts the presets of `configs/` into the package, as `moe_jax/configs`.

Everything else is in pyproject.toml, which cannot say both "find the packages"
and "this one lies elsewhere".
"""

from setuptools import find_packages, setup

setup(
  packages=[*find_packages(include=['moe_jax*']), 'moe_jax.configs'],
  package_dir={'moe_jax.configs': 'configs'},
)
