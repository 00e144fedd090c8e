"""Peak memory of one attribution above the model, measured in a process of its own.

    python -m benchmarks.attribution_memory '{"candidate": "ours", "model": "llama-110m", ...}'

prints the bytes; `measure` starts it. The high-water mark is reset once the model is built and the
candidate has run on a few tokens, so that imports and the building are not counted.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.attribution_rivals import available, ours
from benchmarks.shapes import SHAPES, random_model, random_pairs, word_tokenizer


@dataclass(frozen=True)
class Job:
    """What is run: one pair of a model of `shapes.SHAPES`."""

    candidate: str
    model: str
    prompt_tokens: int
    continuation_tokens: int
    n_steps: int
    max_batch_tokens: int | str
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1


def measure(job: Job) -> int:
    """Peak bytes above the model. Raises RuntimeError with the child's last words."""
    command = [sys.executable, "-m", "benchmarks.attribution_memory", json.dumps(asdict(job))]
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{job.candidate}: {done.stderr.strip()[-800:]}")
    return int(done.stdout.split()[-1])


def _run(job: Job) -> int:
    torch.set_num_threads(job.threads)
    shape = SHAPES[job.model]
    model = random_model(shape, dtype=getattr(torch, job.dtype), device=job.device)
    model.requires_grad_(False)
    tokenizer = word_tokenizer(shape.vocab_size)
    candidate = {**available(), "ours": ours}[job.candidate]

    def run(prompt_tokens: int, n_steps: int) -> None:
        pairs = random_pairs(1, prompt_tokens, job.continuation_tokens, vocab_size=shape.vocab_size)
        candidate(
            model,
            tokenizer,
            pairs,
            method="gausslegendre",
            n_steps=n_steps,
            max_batch_tokens=job.max_batch_tokens,
        )

    run(4, 1)
    gc.collect()
    if job.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(job.prompt_tokens, job.n_steps)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is in use
    before = _status("VmRSS")
    run(job.prompt_tokens, job.n_steps)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes, from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    print(_run(Job(**json.loads(sys.argv[1]))))
