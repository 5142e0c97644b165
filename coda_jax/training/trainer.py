"""What trainers share: arrays on the mesh, the jitted update, global batches."""

import abc
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from coda_jax import sharding, storage
from coda_jax.arrays import Arrays, Tree
from coda_jax.data.inventory import Inventory
from coda_jax.training import checkpoints
from coda_jax.training.logging import parameter_summary, parameter_table, read_metrics


@runtime_checkable
class TrainingState(Protocol):
  """A pytree that an update changes; the paths of its arrays are those of its checkpoints."""

  @property
  def step(self) -> Tree: ...

  @property
  def params(self) -> Tree: ...


State = TypeVar("State", bound=TrainingState)
T = TypeVar("T")
_ON_CARDS = ("psnr", "ssim", "lpips", "codebook_utilization", "loss")  # of evaluations
Batch = TypeVar("Batch")  # a tree of arrays [accumulation, B, ...]


class Stream(enum.IntEnum):
  """Numbers folded into the seed's key. An update folds in its own number, which is below these."""

  EVALUATION = 2**32 - 1
  FIRST_CODES = 2**32 - 2
  DISCRIMINATOR = 2**32 - 3


class Trainer(abc.ABC, Generic[State, Batch]):
  """What is trained; `loop.run` calls it on every process, under `jax.set_mesh(trainer.mesh)`.

  A subclass loads its networks in `__init__`, names how long the run is, and calls `_set_up`.

  Attributes:
    shown: metrics that the progress line shows.
    product: folder of the workdir that `export` writes.
    config, mesh: the run's.
    images_per_step: images of one update, over all devices.
    eval_every: updates between evaluations; 0 evaluates at the end alone.
    steps: updates of the whole run.
    steps_per_epoch: updates of one pass over the data.
    check: an evaluation calls it between batches, on every process; it may raise.
  """

  shown: ClassVar[tuple[str, ...]]
  product: ClassVar[str]
  steps: int
  steps_per_epoch: int

  @classmethod
  def resolved(cls, config: Any) -> Any:
    """The config with the values that depend on what is installed; its record in the workdir."""
    return config

  def __init__(self, config: Any, mesh: jax.sharding.Mesh):
    sharding.check_batch("a micro-batch", config.data.batch_size // config.data.accumulation, mesh)
    sharding.check_batch("config.eval.batch_size", config.eval.batch_size, mesh)
    self.config, self.mesh = config, mesh
    self.images_per_step, self.eval_every = config.data.batch_size, config.eval.every
    self.check: Callable[[], None] = lambda: None

  # A subclass has these.

  @abc.abstractmethod
  def _fresh_state(self, key: jax.Array, given: Arrays) -> State:
    """The state before the first update; traceable.

    Args:
      key: the seed's.
      given: initial parameters that are not drawn, by dotted path.
    """

  @abc.abstractmethod
  def _update(
    self, state: State, frozen: Any, key: jax.Array, batch: Batch
  ) -> tuple[State, dict[str, jax.Array]]:
    """(state, metrics) after one update; traceable.

    Args:
      frozen: arrays that no update changes.
      key: of this update alone.
      batch: micro-batches.
    """

  @abc.abstractmethod
  def _local_batches(self, start: int) -> Any:
    """This process's part of the batches from image number `start` on; has `close`."""

  def _picked(self, batch: dict[str, np.ndarray]) -> Any:
    """The part of a local batch that `_update` takes."""
    return batch

  @abc.abstractmethod
  def inventory(self) -> dict[str, Inventory]:
    """What the run reads, by the key of the config that names it."""

  @abc.abstractmethod
  def metric_names(self) -> Sequence[str]:
    """Names of what `evaluate` measures; none without held-out data."""

  @abc.abstractmethod
  def evaluate(self, state: State) -> dict[str, float]:
    """Metrics of the averaged weights on held-out data; {} without any."""

  def origin(self, state: State, workdir: storage.Path) -> dict[str, str]:
    """How a product came to be, for its card."""
    updates = int(jax.device_get(state.step))
    rows = {"trained on": f"`{self.config.data.train}`"}
    rows["updates"] = f"{updates:,} of {self.images_per_step} images; averaged weights"
    evaluations = [r for r in read_metrics(workdir) if r["kind"] == "eval"]
    if evaluations:
      last = evaluations[-1]
      values = [f"{k} {last[k]:.4g}" for k in _ON_CARDS if isinstance(last.get(k), float)]
      rows["evaluated"] = f"`{self.config.data.eval}`, update {last['step']:,}: {', '.join(values)}"
    return rows

  @abc.abstractmethod
  def export(self, state: State, workdir: storage.Path) -> None:
    """Writes the averaged weights to `workdir`/`product`; a collective."""

  # And has these from here.

  def _set_up(self, frozen: Any, given: Arrays) -> None:
    """Places `frozen` on the mesh and makes the jitted functions.

    Args:
      frozen: a tree of arrays.
      given: see `_fresh_state`; kept on the host.
    """
    self._given = jax.tree.map(np.array, given)
    key = jax.random.key_data(jax.random.key(self.config.seed))
    self._key = self._placed(key, sharding.replicated(self.mesh))
    self._frozen = self._placed(frozen, self._shardings(frozen))
    state = jax.eval_shape(self._first_state, self._key, self._given)
    self._state_shardings = self._shardings(state)
    self._abstract = checkpoints.abstract(state, self._state_shardings)
    # With the shardings of all inputs nothing about a resumed state can differ.
    replicated = sharding.replicated(self.mesh)
    batch = sharding.batch_sharding(self.mesh, leading=1)
    self._step = jax.jit(
      self._keyed_update,
      donate_argnums=0,
      in_shardings=(self._state_shardings, self._shardings(frozen), replicated, batch),
      out_shardings=(self._state_shardings, replicated),
    )

  def _placed(self, tree: Any, shardings: Any) -> Any:
    """The arrays of `tree` on the mesh. `planning` has their shapes alone."""
    return jax.device_put(tree, shardings)

  def _shardings(self, tree: Any):
    return sharding.tree_shardings(tree, self.mesh, self.config.mesh.rules)

  def _first_state(self, key: jax.Array, given: Arrays) -> State:
    return self._fresh_state(jax.random.wrap_key_data(key), given)

  def _keyed_update(self, state: State, frozen: Any, key: jax.Array, batch: Batch):
    key = jax.random.fold_in(jax.random.wrap_key_data(key), state.step)
    return self._update(state, frozen, key, batch)

  def initial_state(self) -> State:
    """The state before the first update."""
    places = {path: self._state_shardings.params[path] for path in self._given}
    given = jax.device_put(self._given, places)
    # On a CPU jax 0.12 takes 196 s for the state of the demo, at this level 10 s; same bits.
    on_cpu = self.mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    make = jax.jit(self._first_state, out_shardings=self._state_shardings, compiler_options=options)
    return make(self._key, given)

  def abstract_state(self) -> State:
    """Shapes, types and shardings of the state."""
    return self._abstract

  def step(self, state: State, batch: Batch) -> tuple[State, Mapping[str, jax.Array]]:
    """One update; `state` is donated. Metrics are scalars or vectors, finite if all is well."""
    return self._step(state, self._frozen, self._key, batch)

  def batches(self, step: int) -> sharding.GlobalBatches:
    """Global batches for the updates from `step` on, a function of the config and `step` alone."""
    data = self.config.data
    local = self._local_batches(step * data.batch_size)
    return sharding.GlobalBatches(local, self.mesh, data.accumulation, self._picked)

  def checked(self, batches: Iterable[T]) -> Iterator[T]:
    """The batches of an evaluation, with a check ahead of each."""
    for batch in batches:
      self.check()
      yield batch

  def overview(self, state: State) -> tuple[str, str]:
    """(a few lines, a table) about the arrays that train and those that do not."""
    groups = {"trained": state.params} | self._frozen_groups()
    return parameter_summary(groups), parameter_table(state.params)

  def _frozen_groups(self) -> dict[str, Arrays]:
    """Frozen arrays by the name under which people know them."""
    return {f"frozen {name}": arrays for name, arrays in self._frozen.items()}
