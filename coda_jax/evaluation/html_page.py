"""HTML pages of one file that need neither network nor server, and their pictures beside them."""

import base64
import html
import io
import pathlib
import string
from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image

_TEMPLATE = pathlib.Path(__file__).with_suffix(".html")


class Pictures:
  """Writes pictures as PNG files beside a page and gives what shows them in it.

  Attributes:
    page: the HTML file.
    files: the pictures written.
  """

  def __init__(self, page: pathlib.Path):
    self.page = page
    self.files: list[pathlib.Path] = []

  def __call__(self, name: str, image: Figure | Image.Image, alt: str) -> str:
    data = _png(image)
    file = self.page.with_name(name)
    file.write_bytes(data)
    self.files.append(file)
    code = base64.b64encode(data).decode()
    return f'<img src="data:image/png;base64,{code}" alt="{html.escape(alt)}">'


def write(path: pathlib.Path, title: str, sections: Sequence[str], measured: Sequence[str]) -> None:
  """Writes a page.

  Args:
    sections: HTML; empty ones are left out.
    measured: HTML of the facts below "How it was measured".
  """
  template = string.Template(_TEMPLATE.read_text(encoding="utf-8"))
  text = template.substitute(
    title=html.escape(title),
    body="\n".join(filter(None, sections)),
    measured="\n".join(f"<li>{fact}</li>" for fact in measured),
  )
  path.write_text(text, encoding="utf-8")


def _png(image: Figure | Image.Image) -> bytes:
  buffer = io.BytesIO()
  if isinstance(image, Figure):
    image.savefig(buffer, format="png", dpi=160, facecolor="white")
  else:
    image.save(buffer, format="png", optimize=True)
  return buffer.getvalue()


def figure(image: str, caption: str) -> str:
  """A picture with HTML below it."""
  return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table of texts."""
  top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
  body = "".join(
    "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows
  )
  return (
    f'<div class="table"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>\n'
  )


def cards(values: Sequence[tuple[str, str, str]]) -> str:
  """Figures to be seen first: (what, value, note)."""
  shown = "".join(
    f'<div class="card"><div class="what">{w}</div><div class="value">{v}</div>'
    f'<div class="note">{n}</div></div>'
    for w, v, n in values
  )
  return f'<div class="cards">{shown}</div>'
