"""What all figures share: colours, plain axes, and how they become files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.errors import UnsupportedError
from fullrank.train.report import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, told apart by colour-blind readers; every line also has a style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", "-.", (0, (1, 1)))
GREY = "#555555"
"""Of what lines are compared with: a threshold, a reference."""
DPI = 110
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "fullrank"}
"""Text stays text, and the names of its parts do not change from one drawing to the next."""


def require_drawing() -> None:
    """Check that figures can be drawn, before the work whose results they would show.

    Raises:
        UnsupportedError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: F401
        from PIL import Image  # noqa: F401, matplotlib needs it too
    except ImportError as error:
        raise UnsupportedError("drawing needs matplotlib. Install it: pip install 'fullrank[report]'") from error


def as_text(name: str) -> str:
    """A user's name for matplotlib: no formula between dollars, and not hidden for its first letter."""
    plain_name = name.replace("$", r"\$")
    return f" {plain_name}" if plain_name.startswith("_") else plain_name


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, whose parts find their places by themselves.

    Raises:
        UnsupportedError: If matplotlib is not installed.
    """
    require_drawing()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def plain(axes: Any) -> None:
    """Axes with a light grid and without the lines at the top and on the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure as ``<path>.png`` and ``<path>.svg``, each whole or not at all; the same figure, the same bytes.

    Args:
        figure: The figure.
        path: Where to, without a suffix.

    Returns:
        Both files.

    Raises:
        UnsupportedError: If matplotlib is not installed.
    """
    return [save_png(figure, f"{path}.png"), save_svg(figure, f"{path}.svg")]


def save_svg(figure: Figure, path: str | Path) -> Path:
    """Write a figure as an SVG.

    Raises:
        UnsupportedError: If matplotlib is not installed.
    """
    require_drawing()
    from matplotlib import rc_context

    _settle(figure)
    text = io.StringIO()
    with rc_context(_SVG):
        figure.savefig(text, format="svg", metadata={"Date": None})
    write_whole(Path(path), "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")
    return Path(path)


def save_png(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG.

    Raises:
        UnsupportedError: If matplotlib is not installed.
    """
    require_drawing()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    _settle(figure)
    canvas: Any = FigureCanvasAgg(figure)  # its methods are without types
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    content = io.BytesIO()
    image.convert("RGB").save(content, "PNG", optimize=True)
    write_whole(Path(path), content.getvalue())
    return Path(path)


def _settle(figure: Figure) -> None:
    """Give the parts of a figure their places once: each drawing would move them a little from the last."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
