"""Lists the packages; everything else is declared in pyproject.toml."""

import setuptools

setuptools.setup(
  packages=[
    *setuptools.find_packages(include=["coda_jax", "coda_jax.*"]),
    "coda_jax.configs",
    "coda_jax.convert",
  ]
)
