"""The ``grains`` command. Each command is a thin caller of the Python function of the same name.

Heavy imports stay inside the commands, so that ``grains --help`` answers at once. Exit codes: 0,
1 for a failure, 2 for wrong use, 130 where the user stopped it.
"""

from grains_ext.cli import (  # noqa: F401 (importing a command registers it)
    adapter,
    attribute,
    bench,
    convert,
    demo,
    evaluate,
    export,
    fit,
    gate,
    generate,
    info,
    inject,
    refine,
    report,
    tune,
)
from grains_ext.cli.app import app, main

__all__ = ["app", "main"]
