"""What all processes of a run must see alike."""

import hashlib
import platform
from pathlib import Path

from accelerate.utils import gather_object

from ..plan import Plan
from ..recipe import Recipe, RecipeError
from .checkpoint import MANIFEST, RunState
from .resume import find_checkpoint


def find_common_checkpoint(recipe: Recipe, plan: Plan) -> tuple[Path, RunState] | None:
    """
    `find_checkpoint` on all processes, which must come to the same.

    Raises:
        RecipeError: on all processes, what one of them refuses, or that they see different checkpoints, as hosts do
            that write to disks of their own.
    """
    found = refusal = None
    try:
        found = find_checkpoint(recipe, plan)
    except ValueError as error:
        refusal = str(error)
    seen = "no checkpoint" if found is None else found[0].name
    answers = gather_object([(refusal, seen, digest(found), platform.node())])
    for other_refusal, *_ in answers:
        if other_refusal is not None:
            raise RecipeError(other_refusal)
    _, first_seen, first_digest, first_host = answers[0]
    for rank, (_, other_seen, other_digest, host) in enumerate(answers):
        if other_digest != first_digest:
            differing = "" if other_seen != first_seen else " with another content"
            raise RecipeError(
                f"process 0 on {first_host} sees {first_seen} and process {rank} on {host} {other_seen}{differing}:"
                f" --output_dir {recipe.run.output_dir} must be on a file system that all hosts share, or its newest"
                " checkpoint be copied to each"
            )
    return found


def digest(found: tuple[Path, RunState] | None) -> str | None:
    """Of the manifest, which holds those of all files."""
    return None if found is None else hashlib.sha256((found[0] / MANIFEST).read_bytes()).hexdigest()
