"""Reruns a table of the paper (GrAInS, arXiv 2507.18043) from pairs to figures with intervals.

    python -m recipes truthfulqa-llama-3.1-8b --data DIR -o results/
    python -m recipes truthfulqa-llama-3.1-8b --smoke -o /tmp/smoke

docs/recipes.md says which files each needs and what the paper does otherwise. A run that was cut
off goes on where it stopped, with the same command.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from recipes.recipe import Recipe, read_recipe, recipe_named, recipes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m recipes",
        description=__doc__,
        epilog=_listed(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="one of those below")
    parser.add_argument("--config", type=Path, help="a run's config.yaml, in a recipe's place")
    parser.add_argument("--smoke", action="store_true", help="all stages, on a small random model")
    parser.add_argument("--model", help="a folder or hub id in the place of the recipe's")
    parser.add_argument("--data", help='the folder of the files, or "datasets": from the hub')
    parser.add_argument("--judge", metavar="MODULE:FUNCTION", help="rates answers: prompt -> reply")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods alone")
    parser.add_argument("--without", nargs="+", metavar="METHOD", help="less these methods")
    parser.add_argument("--seed", type=int, help="of splits, random methods and refining")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default: %(default)s)")
    parser.add_argument("--device", help="by default a GPU where there is one")
    parser.add_argument("-o", "--output", type=Path, help="a folder for everything that is made")
    options = parser.parse_args(arguments)
    if (options.recipe is None) == (options.config is None):
        parser.error("name a recipe, or give --config")
    if options.output is None:
        parser.error("-o: a folder for everything that is made")
    if not options.smoke and options.data is None:
        parser.error('--data: a folder of the files, or "datasets"')
    try:
        recipe = _recipe(options)
        _run(recipe, options)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _recipe(options: argparse.Namespace) -> Recipe:
    recipe = read_recipe(options.config) if options.config else recipe_named(options.recipe)
    if options.smoke:
        recipe = recipe.smoke()
    if options.only:
        recipe = recipe.only(options.only)
    if options.without:
        recipe = recipe.without(options.without)
    return recipe if options.seed is None else recipe.with_seed(options.seed)


def _run(recipe: Recipe, options: argparse.Namespace) -> None:
    # Only now: --help needs no torch.
    import torch

    from recipes.judging import load_judge
    from recipes.run import Sources, run

    judge_name = options.judge
    if options.smoke:
        from recipes.smoke import small_model, write_data

        warnings.filterwarnings("ignore", message=".* did not converge")
        sources = Sources(
            partial(small_model, recipe),
            f"small random {recipe.model['family']}",
            write_data(recipe, options.output / "data"),
        )
        judge_name = judge_name or "recipes.smoke:judge"
    else:
        from grains_ext.cli.loading import load_model

        name = options.model or recipe.model["hub"]
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        sources = Sources(
            lambda: load_model(name, options.dtype, device, False),
            name,
            None if options.data == "datasets" else Path(options.data),
            dtype=options.dtype,
        )
    if judge_name:
        sources = replace(sources, judge=load_judge(judge_name), judge_name=judge_name)
    run(recipe, sources, options.output)
    print((options.output / "table.md").read_text(encoding="utf-8"))


def _listed() -> str:
    from recipes.cost import cost_of

    lines = [
        "recipes, with the GPU memory and the hours on one H100 that they are expected to take:"
    ]
    for name, recipe in recipes().items():
        cost = cost_of(recipe)
        lines.append(f"  {name:28} {cost.memory_gb:4.0f} GB {cost.hours:5.1f} h")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
