"""Whether a run resumes on the images that it was trained on, and what happens if it does not."""

from dataclasses import dataclass, replace
from pathlib import Path

from accelerate.utils import broadcast_object_list

from ..data.fingerprint import fingerprint
from ..reporting import UsageError
from .checkpoint import RunState
from .plan import Plan, warmup_steps
from .recipe import Recipe


@dataclass(frozen=True)
class DataIdentity:
    """Which images a run is trained on; None is unknown."""

    num_samples: int | None = None
    fingerprint: str | None = None


def identify(source, is_first_process: bool) -> DataIdentity:
    """The images of a source. With several processes, all must call it: the first one looks."""
    found = [fingerprint(source) if is_first_process else None]
    broadcast_object_list(found)
    return DataIdentity(source.num_samples, found[0])


def describe_change(state: RunState, data: DataIdentity) -> str | None:
    """How the data differ from those of a checkpoint, None if they do not or if either is unknown."""
    before, now = state.num_samples, data.num_samples
    if before is not None and now is not None and before != now:
        return f"the data set {'grew' if now > before else 'shrank'} from {before:,} to {now:,} images"
    if state.data_fingerprint is not None and data.fingerprint not in (None, state.data_fingerprint):
        return "the data set has the same number of images, but some were replaced, renamed or reordered"
    return None


def is_same_data(state: RunState, data: DataIdentity) -> bool:
    """Whether the images are known to be those of a checkpoint."""
    return data.fingerprint is not None and data.fingerprint == state.data_fingerprint


def check_same_data(recipe: Recipe, folder: Path, state: RunState, data: DataIdentity) -> None:
    """
    Raises:
        UsageError: other images than those of the checkpoint, unless `--allow_data_change`.
    """
    change = describe_change(state, data)
    if change is not None and not recipe.run.allow_data_change:
        raise UsageError(
            f"{change} since {folder} was written: restore the data set, or pass --allow_data_change to continue with"
            " the images that there are now"
        )


def keeps_total_steps(recipe: Recipe, state: RunState, data: DataIdentity) -> bool:
    """Whether the length of the run is that of the checkpoint: the data have changed, now or before."""
    return not recipe.run.allow_recipe_change and (state.data_changes > 0 or describe_change(state, data) is not None)


def plan_to_resume(recipe: Recipe, plan: Plan, state: RunState, data: DataIdentity) -> Plan:
    """
    The plan of a run that resumes. After a change of the data the run keeps its number of steps, and with it its
    schedules; the order of images is that of the new data at the same step.
    """
    if not keeps_total_steps(recipe, state, data):
        return plan
    return replace(plan, total_steps=state.total_steps, warmup_steps=warmup_steps(recipe, state.total_steps))
