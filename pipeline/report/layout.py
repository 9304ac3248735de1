"""Building blocks of the page's sections."""

from collections.abc import Sequence
from html import escape

from pipeline.report.drawing import Drawing, svg


def section(title: str, *body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(body)}</section>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def panels(drawings: Sequence[Drawing], caption: str = "") -> str:
    """Return drawings side by side, wider than the text where there are more than two."""
    caption_html = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    wide = ' class="wide"' if len(drawings) > 2 else ""
    return f'<figure{wide}><div class="panels">{"".join(map(svg, drawings))}</div>{caption_html}</figure>'


def beside(drawing: Drawing, caption: str) -> str:
    """Return a drawing with its caption beside it."""
    return f'<figure class="beside">{svg(drawing)}<figcaption>{escape(caption)}</figcaption></figure>'
