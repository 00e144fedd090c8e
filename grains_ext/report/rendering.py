"""The templates of the HTML pages."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grains_ext.report.text import fit_to_show

if TYPE_CHECKING:
    from jinja2 import Environment, Template

_FOLDER = Path(__file__).with_name("templates")


def template(name: str) -> Template:
    """A template of the ``templates`` folder: values are escaped, a missing one is an error."""
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("pages need Jinja2: pip install 'grains_ext[report]'") from error

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=_fit,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    from markupsafe import Markup

    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The page's own script, and no other: whatever a prompt holds, nothing else can run.
    environment.globals["script"] = Markup(script)
    environment.globals["script_source"] = f"'sha256-{digest}'"
    return environment


def _fit(value: Any) -> Any:
    """Of markup it has been done already."""
    return fit_to_show(value) if type(value) is str else value
