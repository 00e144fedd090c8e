"""grains-lm-eval: the lm-evaluation-harness' own command, with the model type "grains" in it."""

import sys


def main() -> None:
    try:
        from grains_ext.evaluation.harness import main as run
    except ImportError as error:
        sys.exit(f"grains-lm-eval: {error}")
    run()
