"""What inline SVG charts are made of. No style attributes: the pages' policy forbids them."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 24, 12, 38


def y(share: float) -> float:
    """Where a share of the axis lies, from the bottom up."""
    return float(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A line of a class that the style knows."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def text(x: float, y: float, content: str, anchor: str) -> str:
    """A text, escaped."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def frame(x_name: str, y_name: str) -> str:
    """Both axes and their names."""
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    return (
        line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis")
        + line(LEFT, TOP, LEFT, HEIGHT - BOTTOM, "axis")
        + text(middle_x, HEIGHT - 6, x_name, "middle")
        + f'<text x="10" y="{middle_y}" text-anchor="middle"'
        + f' transform="rotate(-90 10 {middle_y})">{escape(y_name)}</text>'
    )


def document(title: str, parts: Sequence[str]) -> Markup:
    """The chart; `title` is what a screen reader says."""
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>'
        + "".join(parts)
        + "</svg>"
    )
