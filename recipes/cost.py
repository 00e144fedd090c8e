"""What a recipe takes: tokens through the model, stage by stage, and from them memory and time.

Counted, not measured: no machine here has held these models. The number of tokens follows from the
settings and the benchmark's typical lengths; the small models' runs count theirs (stages.json), and
tests hold the two against each other. From tokens to seconds: 2 FLOP for each weight and token, as
much again for a backward that needs no gradients of weights, at SPEED; generation reads all weights
for each step, at BANDWIDTH. Memory: the weights in bfloat16, and what the largest call keeps for
its backward by the same prediction that `attribute` fills a GPU with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grains_ext.steering.calibrate import neighbour_sets
from recipes.recipe import Method, Options, Recipe

# A third of what an H100 does in dense bfloat16 matrix products, and two thirds of its memory's.
SPEED, BANDWIDTH = 300e12, 2e12
# Points of the path at which an adaptive attribution of a token baseline is evaluated, on average.
PATH_POINTS = 30
# A chat template's own tokens, a neutral paragraph's, and the few shots' before a kept question.
TEMPLATE_TOKENS, NEUTRAL_TOKENS = 20, 120
_FIRST_PAIRS = 16
_READS = {"grains": 3, "random_tokens": 3, "random_direction": 1, "gradient": 5}
"""Rows that a fit reads for each pair; 3 where it is not named: clean, chosen and rejected."""


@dataclass(frozen=True)
class Cost:
    """tokens: forward passes' tokens by stage, a backward counted as one more forward."""

    tokens: dict[str, float]
    generated: float
    """Decoding steps, each of a full batch."""
    memory_gb: float
    hours: float


def cost_of(recipe: Recipe) -> Cost:
    lengths = _Lengths.of(recipe)
    methods = recipe.methods()
    rows = 1 + sum(method.draws for method in methods.values())
    tokens = {
        "attribute": _attribute(recipe, lengths) if recipe.attributes else 0.0,
        "fit": sum(_fit(recipe, lengths, method) for method in methods.values()),
        "refine": sum(_refine(recipe, lengths, method) for method in methods.values()),
        "tune": sum(_tune(recipe, lengths, method) for method in methods.values()),
        "evaluate": rows * _evaluate(recipe, lengths),
    }
    per_batch = max(1, recipe.settings["max_batch_tokens"] // (lengths.prompt + lengths.generated))
    steps = rows * lengths.generated * math.ceil(lengths.n_asked / per_batch)
    parameters = float(recipe.model["parameters"])
    seconds = 2 * parameters * sum(tokens.values()) / SPEED + 2 * parameters * steps / BANDWIDTH
    return Cost(tokens, steps, _memory(recipe, lengths), seconds / 3600)


@dataclass(frozen=True)
class _Lengths:
    prompt: int
    answer: int
    answers: int
    items: int
    pairs: int
    generated: int
    n_asked: int

    @classmethod
    def of(cls, recipe: Recipe) -> _Lengths:
        tokens, settings = recipe.benchmark["tokens"], recipe.settings
        image = recipe.model.get("image_tokens", 0) if recipe.images else 0
        limit = settings["n_test"]
        items = tokens["items"] if limit is None else min(limit, tokens["items"])
        pairs = tokens.get("pairs", 0)
        asks = tokens.get("generated", False)
        return cls(
            tokens["prompt"] + TEMPLATE_TOKENS + image,
            tokens["answer"],
            tokens["answers"],
            items,
            pairs if limit is None else min(limit, pairs),
            settings["max_new_tokens"] if asks else 0,
            items if asks else 0,
        )

    @property
    def pair(self) -> int:
        """Of a pair's two rows."""
        return 2 * (self.prompt + self.answer)


def _attribute(recipe: Recipe, lengths: _Lengths) -> float:
    points = recipe.settings["attribution"].get("n_steps", PATH_POINTS)
    packed = lengths.prompt + 2 * lengths.answer
    return float(recipe.settings["n_fit"] * (2 * points + 2) * packed)


def _fit(recipe: Recipe, lengths: _Lengths, method: Method) -> float:
    if method.lora is not None:
        steps = recipe.settings["refine"]["steps"] * len(method.lora["learning_rates"])
        return float(2 * steps * recipe.settings["n_fit"] * lengths.pair)
    if method.fit is None:
        return 0.0
    row = lengths.prompt + lengths.answer
    made = method.draws * len(method.variants)
    return float(made * _READS.get(method.fit, 3) * recipe.settings["n_fit"] * row)


def _refine(recipe: Recipe, lengths: _Lengths, method: Method) -> float:
    if method.refine is None:
        return 0.0
    settings = recipe.settings
    neutral = settings["n_neutral"] / 2 * NEUTRAL_TOKENS
    step = 2 * (settings["n_fit"] * lengths.pair + min(1024, neutral))
    look = settings["n_dev"] * lengths.pair + neutral
    looks = 1 + settings["refine"]["steps"] // settings["refine"]["evaluate_every"]
    return float(settings["refine"]["steps"] * step + looks * look)


def _tune(recipe: Recipe, lengths: _Lengths, method: Method) -> float:
    """Fluency by bisection for every run of blocks; then rounds that halve the settings."""
    settings = recipe.settings
    if method.prompt:
        return 0.0
    neutral, n_dev = settings["n_neutral"] / 2 * NEUTRAL_TOKENS, settings["n_dev"]
    if method.lora is not None:
        looks = len(method.lora["learning_rates"]) * (1 + len(method.lora["scales"]))
        return float(looks * (n_dev * lengths.pair + neutral))
    blocks = range(recipe.model["config"]["num_hidden_layers"])
    shortest = settings["tune"]["shortest_run"] * len(blocks)
    runs = [run for run in neighbour_sets(blocks) if len(run) >= shortest]
    n_runs, n_strengths = len(runs), len(settings["tune"]["strengths"])
    if method.refine is not None:
        n_runs, n_strengths = 1, 6
    fluency = n_runs * (1 + math.log2(n_strengths)) * neutral
    first = min(n_dev, _FIRST_PAIRS)
    rounds = 1 + max(0.0, math.log2(n_dev / first))
    margins = n_runs * n_strengths * first * rounds * lengths.pair
    return float(method.draws * len(method.variants) * (fluency + margins))


def _evaluate(recipe: Recipe, lengths: _Lengths) -> float:
    """One condition."""
    kept = recipe.kept["tokens"]
    image = recipe.model.get("image_tokens", 0) if recipe.images else 0
    one = min(recipe.settings["n_kept"], kept["items"]) * (kept["prompt"] + TEMPLATE_TOKENS + image)
    own = lengths.items * lengths.answers * (lengths.prompt + lengths.answer)
    own += lengths.pairs * lengths.pair
    neutral = 3 * recipe.settings["n_neutral"] / 2 * NEUTRAL_TOKENS
    return float(one + own + neutral)


def _memory(recipe: Recipe, lengths: _Lengths) -> float:
    """Weights, and the activations and logits of the largest call with a backward, in GB."""
    config: Options = recipe.model["config"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    block = 2 * (8 * hidden + 3 * inner) + 4 * 2 * hidden
    kept = (config["num_hidden_layers"] + 2) * block
    tokens = max(recipe.settings["max_batch_tokens"], lengths.pair)
    logits = min(tokens, 2048) * config["vocab_size"] * 12
    return float(2 * recipe.model["parameters"] + tokens * kept + logits) / 1e9
