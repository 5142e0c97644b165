"""The one exception that means "the user can fix this"."""


class UserError(Exception):
  """Bad input. The message is one line that names the file, key or value and what to do.

  `coda_jax.cli` prints it and exits with code 1; every other exception is a bug.
  """


def describe(e: BaseException) -> str:
  """One line about a failure that tells the user what to do."""
  if isinstance(e, KeyboardInterrupt):
    return "interrupted"
  cause = e
  while cause is not None:
    if isinstance(cause, UserError):
      return one_line(cause)
    cause = cause.__cause__
  if isinstance(e, OSError) and e.strerror:
    return f"{e.filename}: {e.strerror}" if e.filename is not None else e.strerror
  text = one_line(e)
  if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in text:
    return f"out of memory or disk space: {text}" if text else "out of memory"
  return f"{type(e).__name__}: {text} (--debug shows where)"


def one_line(e: object) -> str:
  """The text of an exception without line breaks."""
  return " ".join(str(e).split())
