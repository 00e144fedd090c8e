"""Formulas of the site as MathML, which browsers draw by themselves: no script and no network.

The pages hold them as LaTeX in fences named ``math``, as GitHub renders them too.
"""

from typing import Any

from latex2mathml.converter import convert


def fence(source: str, language: str, css_class: str, options: Any, md: Any, **kwargs: Any) -> str:
    """A formula of a fence, one for each line that ends in a double backslash."""
    lines = [line.strip() for line in source.split("\\\\")]
    return "\n".join(convert(line, display="block") for line in lines if line)
