"""The lm-evaluation-harness on steered models: the model type "grains".

Importing this module registers it (`pip install 'grains_ext[eval]'`):

    import lm_eval, grains_ext.evaluation.harness
    lm_eval.simple_evaluate(
        model="grains",
        model_args={"pretrained": "./model", "vectors": "./truthful", "strength": 0.4},
        tasks=["truthfulqa_mc1"],
    )

On the command line, with every argument of `lm_eval` itself:

    python -m grains_ext.evaluation.harness run --model grains \\
        --model_args pretrained=./model,vectors=./truthful,strength=0.4 --tasks truthfulqa_mc1

A model that is steered already needs none of this: HFLM(pretrained=model, tokenizer=tokenizer).
"""

from __future__ import annotations

from typing import Any

from grains_ext.steering.positions import Positions
from grains_ext.steering.vectors import SteeringVectors

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f"the lm-evaluation-harness is not there ({error}): pip install 'grains_ext[eval]'"
    ) from error


@register_model("grains")
class SteeredLM(HFLM):
    """A Hugging Face model of the harness, steered.

    pretrained: a folder, a hub id or a loaded model; and every other argument of HFLM.
    vectors: SteeringVectors, or what SteeringVectors.from_pretrained takes.
    strength: in place of the vectors' own. positions: as of SteeringVectors.apply; "prompt",
        "generated" and "last", and gates that read a prompt, only for tasks that generate, since
        the harness scores prompt and continuation in one forward and shows no end of the prompt.

    ``handle`` is the steering: handle.strength = 0 measures the model without it.
    """

    def __init__(
        self,
        pretrained: Any,
        vectors: SteeringVectors | str,
        strength: float | None = None,
        positions: Positions = "all",
        **kwargs: Any,
    ) -> None:
        super().__init__(pretrained=pretrained, **kwargs)
        if not isinstance(vectors, SteeringVectors):
            vectors = SteeringVectors.from_pretrained(vectors)
        self.handle = vectors.apply(self.model, strength, positions=positions)
        self._reads_prompts = positions in ("prompt", "generated", "last") or (
            vectors.gate is not None and vectors.gate.when == "prompt"
        )

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> Any:
        if self._reads_prompts:
            raise ValueError(
                "this steering asks where a prompt ends, which log-likelihood tasks of the harness "
                "do not show: positions='all' and no gate that reads prompts, or "
                "grains_ext.evaluation.evaluate, which tells"
            )
        return super()._loglikelihood_tokens(*args, **kwargs)


def main() -> None:
    """`lm_eval` with the model type registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
