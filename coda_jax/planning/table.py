"""A result as lines for a person."""

from coda_jax.planning.compiling import gib
from coda_jax.planning.verdict import MOST

_GROUPS = {
  "frozen": "frozen networks",
  "trained": "trained, average",
  "moments": "moments",
  "batch": "batch",
}


def lines(result: dict) -> list[str]:
  """The table of a result of `compile_check.run`."""
  versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if k != "jaxlib")
  per_chip = f"{result['images_per_chip']:g} a chip"
  out = [
    f"{result['what']} of {result['config']} on {result['topology']} ({result['chips']} chips), "
    f"{result['images']} images, {per_chip}; {versions}",
    "memory of a chip",
  ]
  out += [f"  {_GROUPS[k]:20} {gib(n):>12}" for k, n in result["groups"].items()]
  for name, n in result.get("memory", {}).items():
    label = "all arguments" if name == "arguments" else name
    out.append(f"  {label:20} {gib(n):>12}")
  out.append(f"  {'together':20} {gib(result['needs']):>12} of {gib(result['limit'])}")
  if result["fits"]:
    out += _work(result)
  out += [
    f"tried: {_tried(row, result['code'])}" for row in (*result["remedies"], *result["search"])
  ]
  if result["largest"] is not None:
    alone = "" if result["code"] else ", by arrays alone"
    more = " or more" if result["largest"] == MOST else ""
    out.append(f"largest batch: {result['largest']}{more} images a device at a time{alone}")
  return [*out, verdict(result)]


def _work(result: dict) -> list[str]:
  costs, seconds = result["costs"], result["seconds"]
  ms = {k: f"{1e3 * s:10.2f} ms" for k, s in seconds.items()}
  tera = lambda n: f"{n / 1e12:.3f}"
  of_kinds = ", ".join(
    f"{costs['count'][k]:.0f} {k} of {n / 1e9:.3f} GB" for k, n in costs["payload"].items()
  )
  loops, xla = costs["unknown_loops"], result["xla"]
  once = ("", "")
  if xla:
    amounts = f"{tera(xla['flops'])}", f"{xla['bytes accessed'] / 1e9:.2f}"
    once = tuple(f" (XLA, loops once: {amount})" for amount in amounts)
  out = [
    "work of a chip, and its least time",
    f"  products     {ms['products']}  {tera(costs['flops'])} TFLOP, {tera(costs['passes'])} in "
    f"bfloat16 passes{once[0]}",
    f"  memory       {ms['memory']}  {costs['traffic'] / 1e9:.2f} GB{once[1]}",
    f"  collectives  {ms['collectives']}  {costs['sent'] / 1e9:.3f} GB sent: {of_kinds or 'none'}",
  ]
  if loops:
    out.append(f"  {loops} loops of unknown length count once")
  rate = result["images_per_second"]
  if rate:
    time = seconds[result["bound"]]
    out.append(
      f"roofline: {result['bound']} bounds it, {1e3 * time:.2f} ms, at most {rate:,.0f} images/s"
    )
    if result["steps"]:
      hours = result["steps"] * time / 3600
      out.append(f"the run: {result['steps']:,} updates, {hours:.2f} hours at least")
  return out


def _tried(row: dict, code: bool) -> str:
  what = row.get("flags") or f"{row['images_per_device']} images a device"
  end = ("fits" if code else "arrays fit") if row["fits"] else "does not fit"
  return f"{what}: {end}, needs {gib(row['needs'])}"


def verdict(result: dict) -> str:
  """One line."""
  if result["fits"]:
    if result["code"]:
      return "fits"
    left = gib(result["limit"] - result["needs"])
    return f"the arrays fit; {left} are left for the program's code and what else is not counted"
  needs = f"does not fit: needs {gib(result['needs'])} of {gib(result['limit'])}"
  if not result["remedies"]:
    return needs
  helps = [row["flags"] for row in result["remedies"] if row["fits"]]
  return f"{needs}; it fits with {' or with '.join(helps) or 'none of what was tried'}"
