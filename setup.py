"""Kept for tools that expect a setup.py; everything is declared in pyproject.toml."""

import setuptools

setuptools.setup()
