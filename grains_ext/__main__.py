"""``python -m grains_ext`` is the ``grains`` command."""

from grains_ext.cli import main

main()
