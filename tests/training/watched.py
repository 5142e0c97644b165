"""`coda_jax.train` that tells what it does: `python -m tests.training.watched FOLDER ...`.

FOLDER/phase-PROCESS holds what the process does now. FOLDER/images-PROCESS has a line for each
update: its number and the rows of the images that this process gave to it.
"""

import pathlib
import sys
import time

import jax

from coda_jax import train
from coda_jax.training.tokenizer_trainer import TokenizerTrainer

BEFORE_EXPORT = 1.0  # seconds, in which a signal may come


def main(folder: pathlib.Path, words: list[str]) -> None:
  """Trains with the command line `words`."""

  def phase(name: str) -> None:
    (folder / f"phase-{jax.process_index()}").write_text(name)

  def telling(method: str, name: str, pause: float = 0.0) -> None:
    original = getattr(TokenizerTrainer, method)

    def wrapped(self, *args):
      phase(name)
      time.sleep(pause)
      try:
        return original(self, *args)
      finally:
        phase("update")

    setattr(TokenizerTrainer, method, wrapped)

  local_batches, picked, update = TokenizerTrainer._local_batches, TokenizerTrainer._picked, [0]

  def starting(self, start):
    update[0] = start // self.config.data.batch_size
    return local_batches(self, start)

  def picking(self, batch):
    with (folder / f"images-{jax.process_index()}").open("a") as file:
      file.write(f"{update[0]} {' '.join(map(str, batch['index']))}\n")
    update[0] += 1
    return picked(self, batch)

  TokenizerTrainer._local_batches, TokenizerTrainer._picked = starting, picking
  telling("initial_state", "initial state")
  telling("evaluate", "evaluation")
  telling("export", "export", BEFORE_EXPORT)
  train.main(words)


def images(folder: pathlib.Path) -> dict[int, list[int]]:
  """The rows of each update's images, sorted. An update that was done again had the same ones."""
  parts: dict[int, dict[tuple[int, ...], None]] = {}
  for file in sorted(folder.glob("images-*")):
    for line in file.read_text().splitlines():
      update, *rows = map(int, line.split())
      parts.setdefault(update, {})[tuple(rows)] = None
  return {update: sorted({row for part in parts[update] for row in part}) for update in parts}


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), sys.argv[2:])
