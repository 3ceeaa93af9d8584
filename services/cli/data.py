"""`offbeat data`: choose the prompts that runs train on."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from services.cli.output import AsJson, print_json, say
from services.cli.session import Code, Failure, Session
from services.cli.specs import Sets, load_spec
from services.local.programs import ProgramFailed, run_module

app = typer.Typer(no_args_is_help=True, help="Choose the prompts that runs train on.")
SENTENCE_TRANSFORMERS = "sentence-transformers:"


class By(StrEnum):
    RANDOM = "random"
    CLUSTERS = "clusters"


@app.command("subset")
def subset(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="SPEC", help='Run spec in TOML or JSON, with the data and the policy; "-" reads TOML.')],
    size: Annotated[int, typer.Option(min=1, help="Prompts to choose.")],
    out: Annotated[Path, typer.Option(help="File to write, one prompt id a line, for data.ids.")],
    by: Annotated[By, typer.Option(help="At random, or out of the largest clusters: a less diverse subset of the same size.")] = By.RANDOM,
    clusters: Annotated[int | None, typer.Option(min=1, help="Clusters to make; default: a 17th of the prompts, 8 to 1000.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the draw and of the clusters.")] = 0,
    embedding: Annotated[
        str, typer.Option(help="What is clustered: policy (mean-pooled last hidden states of the spec's model) or sentence-transformers:NAME.")
    ] = "policy",
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Choose some of a data set's prompts, so that the diversity of the data is a factor of a study. No stack needs to run.

    A run uses them with data.ids = "FILE", and keeps their ids. Equal seeds choose equal prompts, and a smaller subset lies within a larger one.

    Example: offbeat data subset deploy/runs/demo.toml --size 12 --by clusters --clusters 4 --out ids.txt
    """
    session: Session = ctx.obj
    if by is By.RANDOM and clusters is not None:
        raise Failure("--clusters is for --by clusters: leave it out, or choose by clusters", code=Code.USAGE)
    if embedding != "policy" and not embedding.removeprefix(SENTENCE_TRANSFORMERS).strip(" :"):
        raise Failure(f"--embedding {SENTENCE_TRANSFORMERS} names no model: give one after the colon", code=Code.USAGE)
    if embedding != "policy" and not embedding.startswith(SENTENCE_TRANSFORMERS):
        raise Failure(f"--embedding {embedding!r} is unknown: use policy or {SENTENCE_TRANSFORMERS}NAME", code=Code.USAGE)
    if out.exists() and not force:
        raise Failure(f"{out} is there: give another file with --out, or --force to write over it", code=Code.USAGE)
    spec = load_spec(file, sets or ())

    # scikit-learn takes a second to load, which the other commands need not wait for
    import numpy as np

    from services.studies.subsets import at_random, by_clusters, default_clusters

    with TemporaryDirectory(prefix="offbeat-") as folder:
        spec_file, prompts, vectors = (Path(folder) / name for name in ("spec.json", "prompts.jsonl", "embeddings.npy"))
        spec_file.write_text(spec.model_dump_json())
        _run(session, "services.control_plane.data", "--spec", str(spec_file), "--out", str(prompts))
        with prompts.open(encoding="utf-8") as lines:
            ids = [json.loads(line)["id"] for line in lines]
        if size > len(ids):
            raise Failure(f"--size {size} is above the {len(ids)} prompts that there are: lower it", code=Code.USAGE)
        if by is By.RANDOM:
            chosen = at_random(len(ids), size, seed=seed)
        else:
            options = ("--spec", str(spec_file), "--prompts", str(prompts), "--embedding", embedding, "--out", str(vectors))
            _run(session, "trainer.embed", *options)
            chosen = by_clusters(np.load(vectors), size, clusters=clusters or default_clusters(len(ids)), seed=seed)
    out.write_text("".join(f"{ids[place]}\n" for place in chosen.places), encoding="utf-8")
    if as_json:
        print_json(
            session.out,
            {
                "path": out, "size": size, "prompts": len(ids), "by": by.value, "seed": seed, "clusters": chosen.clusters,
                "touched": chosen.touched, "embedding": embedding if by is By.CLUSTERS else None,
            },
        )  # fmt: skip
        return
    how = "at random" if chosen.clusters is None else f"out of the largest {chosen.touched} of {chosen.clusters} clusters"
    say(session.out, f"{out}: {size} of {len(ids)} prompts, {how}, seed {seed}. Use it with --set data.ids={out}")


def _run(session: Session, module: str, *arguments: str) -> None:
    try:
        run_module(module, *arguments, progress=lambda line: say(session.err, line, "dim"))
    except ProgramFailed as failed:
        raise Failure(str(failed).rpartition("\n")[2]) from failed
