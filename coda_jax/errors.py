"""The one exception that means "the user can fix this"."""


class UserError(Exception):
  """Bad input. The message is one line that names the file, key or value and what to do.

  `coda_jax.cli` prints it and exits with code 1; every other exception is a bug.
  """
