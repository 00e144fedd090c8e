"""The demo: from preference pairs to a steered ONNX model, on the embedded Llama, judged held-out.

Every number it shows is measured in the run; what is set in advance stands in `compare.Sizes`.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import grains_ext
from grains_ext import export
from grains_ext.attribution import Attribution, attribute
from grains_ext.demo import compare, show
from grains_ext.demo.contexts import one_thread, step
from grains_ext.demo.speed import Spread, interleaved_rates
from grains_ext.demo.train import MODEL_DIR
from grains_ext.encoding import encode_prompt
from grains_ext.evaluation.generation import generate
from grains_ext.export.folder import GRAPH_NAME, UNSTEERED_NAME
from grains_ext.export.runtime import require_onnxruntime
from grains_ext.progress import no_loading_bars
from grains_ext.report import Generation, write_report
from grains_ext.report.show import legend, tokens
from grains_ext.steering import SteeringVectors

onnxruntime = require_onnxruntime()

OUTPUTS = ("vectors", "onnx", "demo.json", "report.html")
# Held-out prompts that are shown: always the first ones of the draw.
N_SHOWN = 3
# Enough for the answer and the closing sentence.
N_GENERATED = 8
UNSTEERED = "unsteered"


def load_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The embedded model in float32 and eval mode, and its tokenizer."""
    with no_loading_bars():
        model = LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(MODEL_DIR)


def run_demo(
    output_dir: str | Path,
    *,
    seed: int = 0,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the demo, prints it, and writes vectors/, onnx/, demo.json and report.html.

    Args:
      output_dir: made where missing. What an earlier run left is replaced, by a run that succeeds.
      seed: draws the pairs, the stories and the random baselines.
      quick: fewer pairs, strengths, draws and rounds, for a look: the intervals are wide.
      console: where to print; standard output by default.

    Returns what demo.json holds.
    """
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    with one_thread(), tempfile.TemporaryDirectory(prefix=".demo-", dir=output) as work:
        demo = _Demo(Path(work), seed, compare.QUICK if quick else compare.Sizes(), console)
        result = demo.run()
        for name in OUTPUTS:
            if (output / name).is_dir():
                rmtree(output / name)
            Path(work, name).replace(output / name)
    console.print(f"\nWritten to {output}: {', '.join(OUTPUTS)}", highlight=False, markup=False)
    return result


class _Demo:
    """One run. Each step prints its part and returns what later steps and the files need."""

    def __init__(self, folder: Path, seed: int, sizes: compare.Sizes, console: Console) -> None:
        self.folder, self.seed, self.sizes, self.console = folder, seed, sizes, console
        self.model, self.tokenizer = load_model()
        self.data = compare.Data.of(seed, sizes)
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        show.banner(self.console, sum(p.numel() for p in self.model.parameters()))
        shown = self._attribute_shown()
        candidates = self._fit()
        unsteered, methods = self._compare(candidates)
        refined = methods[1].draws[0].tuned
        assert refined is not None
        refined.best.save_pretrained(self.folder / "vectors")
        generations = self._generate(refined.best)
        exported = self._export(refined.best)
        everything = [unsteered, *methods]
        reference = unsteered.draws[0].perplexity
        versions = {
            "grains_ext": grains_ext.__version__,
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
        }
        rows = [method.row(reference) for method in everything]
        result = {
            "format": "grains.demo",
            "version": 1,
            "seed": self.seed,
            "versions": versions,
            "threads": torch.get_num_threads(),
            "sizes": asdict(self.sizes),
            "max_perplexity_ratio": compare.MAX_PERPLEXITY_RATIO,
            "rows": [asdict(row) for row in rows],
            "methods": [method.as_dict(reference) for method in everything],
            "generations": [asdict(generation) for generation in generations],
            "attributions": [attribution.to_dict() for attribution in shown],
            "export": exported,
            "seconds": self.seconds,
        }
        (self.folder / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
        write_report(
            self.folder / "report.html",
            title="grains demo: evidence against belief",
            attributions=shown,
            rows=rows,
            generations=generations,
            metadata={
                "The steered ONNX model": show.export_facts(exported),
                "Run": {"seed": self.seed, **versions, **asdict(self.sizes)},
            },
        )
        return result

    def _step(self, name: str) -> AbstractContextManager[None]:
        return step(self.console, name, self.seconds)

    def _attribute_shown(self) -> list[Attribution]:
        show.heading(self.console, "1. Which tokens push toward which answer")
        with self._step("attributing the shown prompts"):
            shown = attribute(
                self.model, self.tokenizer, self.data.test_pairs[:N_SHOWN], progress=False
            )
        self.console.print(legend())
        for attribution in shown:
            self.console.print(tokens(attribution))
        return shown

    def _fit(self) -> dict[str, list[list[SteeringVectors]]]:
        pairs = self.data.fit_pairs
        show.heading(self.console, "2. From pairs to directions")
        with self._step("attributing the pairs to fit on"):
            attributions = attribute(self.model, self.tokenizer, pairs, progress=False)
        with self._step("fitting all methods"):
            candidates = compare.fit_methods(
                self.model,
                self.tokenizer,
                pairs,
                attributions,
                k=self.sizes.k,
                seeds=range(self.seed, self.seed + self.sizes.random_draws),
            )
        converged = sum(attribution.converged for attribution in attributions)
        seconds = self.seconds["attributing the pairs to fit on"]
        self.console.print(
            f"{len(pairs)} pairs attributed in {seconds:.1f} s, {converged} within tolerance; the "
            f"{self.sizes.k} strongest tokens of each sign masked; one direction for each of "
            f"{self.model.config.num_hidden_layers} blocks.",
            highlight=False,
        )
        return candidates

    def _compare(
        self, candidates: dict[str, list[list[SteeringVectors]]]
    ) -> tuple[compare.MethodResult, list[compare.MethodResult]]:
        """The unsteered model, and the methods: ours, ours refined, the others."""
        show.heading(self.console, "3. Held out: other entities, other cue words")
        arguments = (self.model, self.tokenizer, self.data)
        with self._step("unsteered"):
            unsteered = compare.MethodResult(UNSTEERED, [compare.judged(*arguments, None)])
        methods = []
        for name, drawn in candidates.items():
            with self._step(f"tuning and testing {name}"):
                tuned = [
                    compare.tuned(*arguments, variants, strengths=self.sizes.strengths)
                    for variants in drawn
                ]
                draws = [compare.judged(*arguments, chosen) for chosen in tuned]
            methods.append(compare.MethodResult(name, draws))
            if name == compare.OURS:
                methods.append(self._refine(tuned[0].best))
        reference = unsteered.draws[0].perplexity
        rows = [method.row(reference) for method in (unsteered, *methods)]
        self.console.print(show.comparison(rows))
        ours = methods[0].draws[0].tuned
        assert ours is not None
        variants = ", ".join(
            f"{100 * a:.0f} % by {name}" for name, a in ours.dev_accuracies.items()
        )
        self.console.print(
            f"Every method has one block and a strength, tuned on the same {self.sizes.dev_pairs} "
            f"pairs with perplexity on stories within {compare.MAX_PERPLEXITY_RATIO} times the "
            "unsteered; ours and random tokens also which of the masked shifts v+ and v- to use "
            f"(ours on those pairs: {variants}). Refined: {self.sizes.refine_steps} gradient steps "
            "on the direction above it, then tuned again; no weight changes. Draws are pooled in "
            "their row.",
            highlight=False,
        )
        return unsteered, methods

    def _refine(self, start: SteeringVectors) -> compare.MethodResult:
        arguments = (self.model, self.tokenizer, self.data)
        with self._step(f"refining, tuning and testing {compare.REFINED}"):
            tuned = compare.refined(
                *arguments,
                start,
                steps=self.sizes.refine_steps,
                strengths=self.sizes.strengths,
            )
            return compare.MethodResult(compare.REFINED, [compare.judged(*arguments, tuned)])

    def _generate(self, vectors: SteeringVectors) -> list[Generation]:
        show.heading(self.console, "4. Before and after")
        pairs = self.data.test_pairs[:N_SHOWN]
        prompts = [encode_prompt(self.tokenizer, pair.prompt) for pair in pairs]
        options = {"max_new_tokens": N_GENERATED, "pad_id": self.tokenizer.pad_token_id}
        with self._step("generating"):
            before = generate(self.model, self.tokenizer, prompts, **options)
            with vectors.applied(self.model):
                after = generate(self.model, self.tokenizer, prompts, **options)
        generations = [
            Generation(str(pair.prompt), pair.chosen, *texts)
            for pair, *texts in zip(pairs, before, after, strict=True)
        ]
        self.console.print(show.generations(generations))
        return generations

    def _export(self, vectors: SteeringVectors) -> dict[str, Any]:
        show.heading(self.console, "5. The steered ONNX model")
        folder = self.folder / "onnx"
        with self._step("exporting and verifying"):
            parity = export.export_model(
                self.model, self.tokenizer, vectors, folder, keep_unsteered=True
            )
        assert parity is not None
        with self._step("timing"):
            rates = self._rates(folder)
        exported = {
            "parity": {**asdict(parity), "max_absolute_error": parity.max_absolute_error},
            "rates": {
                name: {
                    "tokens_per_second": asdict(Spread.of(values)),
                    "relative_to_unsteered": asdict(
                        Spread.of([a / b for a, b in zip(values, rates[UNSTEERED], strict=True)])
                    ),
                }
                for name, values in rates.items()
            },
        }
        self.console.print(show.exported(exported))
        return exported

    def _rates(self, folder: Path) -> dict[str, list[float]]:
        graphs = {
            UNSTEERED: (UNSTEERED_NAME, False),
            "steered, stock onnxruntime": (GRAPH_NAME, False),
            "steered, with the op library": (GRAPH_NAME, True),
        }
        decoders = {}
        for name, (file, library) in graphs.items():
            options = onnxruntime.SessionOptions()
            # A model this small gains nothing from more threads, and the timing loses its noise.
            options.intra_op_num_threads = 1
            # It warns of every input with a default value; these are meant to be there.
            options.log_severity_level = 3
            decoders[name] = export.OnnxDecoder(
                export.session(folder / file, library=library, session_options=options)
            )
        prompt_ids = encode_prompt(self.tokenizer, self.data.test_pairs[0].prompt)
        return interleaved_rates(
            decoders,
            prompt_ids,
            tokens=self.sizes.speed_tokens,
            rounds=self.sizes.speed_rounds,
        )
