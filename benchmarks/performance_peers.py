"""The section on other libraries in docs/performance.md, and the README's table of them: results of peers.py."""

from .performance_numbers import Spread, ratio, spread, table


TITLES = {
    "ours": "ours",
    "plain": "plain: torchvision transforms, plain step",
    "lightly": "lightly",
    "lightly-train": "lightly-train",
    "stable-pretraining": "stable-pretraining",
    "timm": "timm",
    "albumentations": "albumentations",
    "albumentationsx": "AlbumentationsX",
    "dali": "NVIDIA DALI",
}
TASKS = {
    "views": "complete views",
    "crops": "both crops",
    "loader": "data loader",
    "step_no": "float32 step",
    "step_bf16": "bf16 step",
}
DATA, STEPS = ("views", "crops", "loader"), ("step_no", "step_bf16")
SAME = 0.02  # speeds closer than this are called equal


def seconds(run: dict, task: str, name: str) -> list[float]:
    """CPU seconds per image in each round; empty if the library does not do the task."""
    return run["seconds_per_image"].get(task, {}).get(name, {}).get("cpu", [])


def rate(run: dict, task: str, name: str) -> Spread | None:
    """Images per CPU second."""
    taken = seconds(run, task, name)
    return spread([1 / each for each in taken]) if taken else None


def rate_text(run: dict, task: str, name: str, spreads: bool = True) -> str:
    found = rate(run, task, name)
    if found is None:
        return "–"
    digits = 0 if found.median >= 20 else 2
    return found.text(digits) if spreads else f"{found.median:.{digits}f}"


def times_ours(run: dict, task: str, name: str) -> Spread | None:
    """How many times as fast ours is, round by round."""
    taken = seconds(run, task, name)
    return ratio(taken, seconds(run, task, "ours")) if taken else None


def names_of(run: dict, tasks: tuple[str, ...] = tuple(TASKS)) -> list[str]:
    return [name for name in TITLES if any(seconds(run, task, name) for task in tasks)]


def faster_than_ours(run: dict, tasks: tuple[str, ...]) -> str:
    """A sentence for each task: which libraries are faster than ours, and how much."""
    sentences = []
    for task in tasks:
        others = [name for name in names_of(run, (task,)) if name != "ours"]
        if not others:
            continue
        faster = {name: 1 / times_ours(run, task, name).median for name in others}
        faster = {name: times for name, times in faster.items() if times > 1 + SAME}
        listed = [f"{TITLES[name].split(':')[0]} ({times:.2f}×)" for name, times in faster.items()]
        sentences.append(f"in {TASKS[task]}, {', '.join(listed) or 'none'}")
    return f"Faster than ours: {'; '.join(sentences)}."


def peers_section(results: dict) -> str:
    """
    All tables of docs/performance.md.

    Raises:
        ValueError: The results are those of a quick test.
    """
    if results["quick"]:
        raise ValueError("the results of peers.py are those of --quick: run python -m benchmarks.peers without it")
    run, *limited = results["runs"]
    has = ", ".join(name for name, there in results["instructions"].items() if there)
    about = run["peers"]
    dates = sorted({when["date"][:10] for each in results["runs"] for when in each["when"].values()})
    sections = [
        f"[peers_cpu.json](../benchmarks/results/peers_cpu.json), {', '.join(dates)}; one core of {results['device']}"
        f" with {has or 'no AVX2'}. {results['images']} JPEG files of {results['mean_file_bytes'] / 1e3:.0f} KB on"
        f" average, images per second of CPU time. {versions_text(about)}",
        data_table(run),
        f"{faster_than_ours(run, DATA)} {differences_text(about, results['skipped'], run['failed'])}",
        f"ViT-S/16 step, batch {results['step_batch']}, both views in memory:\n\n{step_table(run)}",
        f"{faster_than_ours(run, STEPS)}",
    ]
    sections += [limited_section(run, other) for other in limited]
    return "\n\n".join(sections)


def versions_text(about: dict) -> str:
    common = {name: version for name, version in about["plain"]["versions"].items() if name != "timm"}
    return f"{', '.join(f'{name} {version}' for name, version in common.items())}."


def data_table(run: dict) -> str:
    rows = []
    for name in names_of(run, DATA):
        about = run["peers"][name]
        version = "" if name in ("ours", "plain") else f" {about['versions'][about['package']]}"
        rows.append(
            [
                f"{TITLES[name]}{version}",
                about["decoder"],
                about["resize"],
                *(rate_text(run, task, name) for task in DATA),
                spread([1e3 * taken for taken in seconds(run, "views", name)]).text(1)
                if seconds(run, "views", name)
                else "–",
            ]
        )
    head = [
        "library",
        "decoder",
        "resize",
        "complete views",
        "both crops",
        "data loader, 1 worker",
        "complete views, ms",
    ]
    return table(head, rows)


def differences_text(about: dict, skipped: dict[str, str], failed: list[dict]) -> str:
    """What the libraries do in another way, and which of them are missing."""
    differ = [f"{TITLES[name]}, {peer['differences']}" for name, peer in about.items() if peer["differences"]]
    text = f"Other than in the paper: {'; '.join(differ)}." if differ else ""
    missing = [f"{TITLES.get(name, name)} ({reason})" for name, reason in skipped.items()]
    missing += [f"{TITLES[each['library']]}, {TASKS[each['task']]} ({each['error']})" for each in failed]
    return f"{text} Not measured: {'; '.join(missing)}.".strip() if missing else text


def step_table(run: dict) -> str:
    rows = []
    for name in names_of(run, STEPS):
        row = [TITLES[name] if name != "plain" else "plain step"]
        for task in STEPS:
            times = times_ours(run, task, name)
            row += [rate_text(run, task, name), "–" if times is None else times.text()]
        rows.append(row)
    return table(["step", "float32, images/s", "ours is faster by", "bf16, images/s", "ours is faster by"], rows)


def limited_section(run: dict, limited: dict) -> str:
    """The same with fewer instructions: medians with all of them and with those."""
    tasks = (*DATA, "step_no")
    rows = [
        [
            TITLES[name],
            *(
                f"{rate_text(run, task, name, False)} → {rate_text(limited, task, name, False)}"
                if seconds(run, task, name) and seconds(limited, task, name)
                else "–"
                for task in tasks
            ),
        ]
        for name in names_of(limited, tasks)
    ]
    changes = ", ".join(
        f"{TASKS[task]} {rate(limited, task, 'ours').median / rate(run, task, 'ours').median:.2f} times as fast"
        for task in tasks
        if seconds(limited, task, "ours") and seconds(run, task, "ours")
    )
    return (
        "Limited to AVX2 by the environment variables of torch, oneDNN, MKL, OpenCV and numpy (DALI and the kernels of"
        " albumentations that use neither have no such variable), images/s with all instructions → with AVX2:\n\n"
        f"{table(['library', *(TASKS[task] for task in tasks)], rows)}\n\nWith AVX2 only, ours is: {changes}."
        f" {faster_than_ours(limited, tasks)}"
    )


def peers_table(results: dict) -> str:
    """The README's table, medians with all instructions, and what is faster than ours."""
    run = results["runs"][0]
    rows = [
        [
            TITLES[name],
            *(rate_text(run, task, name, False) for task in DATA),
            ", ".join(rate_text(run, task, name, False) for task in STEPS)
            if any(seconds(run, task, name) for task in STEPS)
            else "–",
        ]
        for name in names_of(run)
    ]
    head = [
        f"{results['device']}, images/s of one core",
        *(TASKS[task] for task in DATA),
        "ViT-S/16 step, float32, bf16",
    ]
    return table(head, rows)
