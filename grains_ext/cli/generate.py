"""grains generate: text from an exported folder."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from grains_ext.cli.app import command
from grains_ext.cli.options import Json
from grains_ext.cli.output import print_json


@command()
def generate(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="A folder that 'grains export' wrote.",
        ),
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to go on from.")],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture that the prompt is about; once for each of them."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Overrules the graph's strength; 0 switches steering off.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message to a chat model.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=1e-9, max=1.0, help="Draw from the likeliest, up to this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Write text with an exported folder, token by token: onnxruntime, no torch.

    Example: [bold]grains generate steered/ "What color is the sky?" --strength 2 --chat[/bold]

    Pictures go through the model's processor, which needs transformers, torch and Pillow.
    """
    from grains_ext.export import TextGenerator

    if not (folder / "model.onnx").is_file():
        raise FileNotFoundError(
            f"{folder} has no model.onnx: give a folder that 'grains export' wrote"
        )
    generator = TextGenerator(folder, strength=strength)
    pieces = generator.stream(
        [{"role": "user", "content": prompt}] if chat else prompt,
        images=image or [],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    start = time.perf_counter()
    tokens, text = [], ""
    for token, piece in pieces:
        tokens.append(token)
        text += piece
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if not as_json:
        sys.stdout.write("\n")
        return
    print_json(
        {
            "prompt": prompt,
            "text": text,
            "tokens": tokens,
            "strength": strength,
            "finish": "stop" if tokens and generator.ends(tokens[-1]) else "length",
            "seconds": time.perf_counter() - start,
        }
    )
