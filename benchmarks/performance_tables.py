"""Figures of bench.py as text: pure functions from the results of a machine to Markdown."""

from .performance_figures import (
    LIMITS,
    NAMES,
    OPERATIONS,
    PRECISIONS,
    Spread,
    gpu_step_reached,
    gpu_times_plain,
    limit_rates,
    plain_and_ours,
    ratio,
    result,
    spread,
    step_name,
    step_reached,
    table,
    update_reached,
)


SHOWN_PROCESSES = (2, 8, 16, 64)
LEAST_SHARE = 0.01  # of a kind of kernel, to be named


def report(results: dict) -> str:
    """The section of one machine in docs/performance.md."""
    writers = {
        "limits_before": limits_section,
        "data_path": data_path_section,
        "step": step_section,
        "updates": updates_section,
        "memory": memory_section,
        "inference": inference_section,
        "scaling": scaling_section,
    }
    sections = [heading(results)]
    for part, write in writers.items():
        if part in results["parts"]:
            sections.append(write(results))
        elif part in results["failed"]:
            sections.append(f"### {part}\n\nFailed with exit code {results['failed'][part]['exit_code']}.\n")
    sections.append(runs_section(results))
    return "\n".join(sections)


def heading(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    where = f"{results['device']}, {results['cores']} cores" if results["device_type"] == "cpu" else results["device"]
    return (
        f"## {where}\n\n![Figures of this machine](performance/{results['machine']}.svg)\n\n"
        f"[{results['machine']}.json](../benchmarks/results/{results['machine']}.json); {results['system']}, Python"
        f" {results['python']}, {versions}. Photographs: {results['images']}.\n"
    )


def limits_section(results: dict) -> str:
    before, after = (result(results, f"limits_{when}") for when in ("before", "after"))
    rows = []
    for name, limit in before["limits"].items():
        digits = 0 if limit["unit"] == "GFLOP/s" else 1
        later = spread(after["limits"][name]["rates"]).text(digits) if after else "–"
        drift = f"{results['drift'][name]:.2f}" if after else "–"
        rows.append([LIMITS[name], limit["unit"], spread(limit["rates"]).text(digits), later, drift])
    return (
        "### Limits\n\nBefore and after all parts; a drift from 1 is how much the machine itself changed.\n\n"
        f"{table(['operation', 'unit', 'before', 'after', 'drift'], rows)}\n"
    )


def data_path_section(results: dict) -> str:
    data = result(results, "data_path")
    core = data["one_core"]
    seconds, images = core["cpu_seconds"], data["images"]
    names = {
        "classic": "classic: PIL and torchvision transforms",
        "ours": "ours",
        "decode": "decoding alone: the limit",
    }
    rows = [
        [
            text,
            spread([1e3 * taken / images for taken in seconds[name]]).text(),
            ratio(seconds["classic"], seconds[name]).text(),
            ratio(seconds["decode"], seconds[name]).percent(),
        ]
        for name, text in names.items()
    ]
    text = (
        f"### Data path\n\nBoth views of {images} photographs of {data['mean_file_bytes'] / 1e3:.0f} KB, one core,"
        f" CPU time.\n\n{table(['', 'ms per image', 'times classic', 'of the limit'], rows)}\n"
    )
    rows = [
        [
            workers if workers != "1 workers" else "1 worker",
            *(
                spread([1 / taken for taken in figures["wall_seconds_per_image"][who]]).text(0)
                for who in ("classic", "ours")
            ),
            ratio(*(figures["wall_seconds_per_image"][who] for who in ("classic", "ours"))).text(),
            ratio(*(figures["cpu_seconds_per_image"][who] for who in ("classic", "ours"))).text(),
        ]
        for workers, figures in data["loaders"].items()
    ]
    head = ["whole loader", "classic, images/s", "ours, images/s", "times, wall", "times, CPU"]
    text += f"\n{table(head, rows)}\n"
    if "device_stage" in data:
        stage = data["device_stage"]
        text += (
            f"\nThe photometric stage on {stage['device']} makes both views of {stage['images_per_second']:.0f}"
            f" images/s: {100 * stage['share_of_step']:.1f} % of a ViT-S step.\n"
        )
    return text


def step_section(results: dict) -> str:
    points = result(results, "step")["points"]
    if results["device_type"] == "cuda":
        return gpu_step_section(points)
    rows = [
        [
            step_name(point),
            *(spread(point["cpu_seconds"][who]).text() for who in ("plain", "ours")),
            ratio(*plain_and_ours(point["cpu_seconds"])).text(),
            f"{limit_rates(point).text(0)}, {OPERATIONS[point['limit']['operation']]}",
            *(step_reached(point, who).percent() for who in ("plain", "ours")),
        ]
        for point in points
    ]
    head = ["step", "plain, s", "ours, s", "times plain", "limit, GFLOP/s", "plain reaches", "ours reaches"]
    batches = ", ".join(sorted({str(point["batch"]) for point in points}, key=int))
    counted = "; ".join(
        f"{NAMES[point['backbone']]} {point['flop_per_image']['plain'] / 1e9:.1f} GFLOP an image"
        f" (ours {point['flop_per_image']['ours'] / 1e9:.1f})"
        for point in points
        if point["mixed_precision"] == points[0]["mixed_precision"]
    )
    choices = "; ".join(f"{step_name(point)}: {point['acceleration']}" for point in points)
    return (
        f"### Pre-training step\n\nBatch {batches}, one core, CPU time. {counted}.\n\n{table(head, rows)}\n\n"
        f"Chosen for ours: {choices}.\n"
    )


def gpu_step_section(points: list[dict]) -> str:
    rows = []
    for point in points:
        for name, figures in point["variants"].items():
            rows.append(
                [
                    step_name(point),
                    str(point["batch"]),
                    name,
                    spread(figures["images_per_second"]).text(0),
                    gpu_times_plain(point, name).text(),
                    gpu_step_reached(point, name).percent(),
                    "–" if figures["mfu"] is None else f"{100 * figures['mfu']:.1f} %",
                    "–" if figures["peak_memory_gib"] is None else f"{figures['peak_memory_gib']:.1f}",
                ]
            )
    head = ["step", "batch", "variant", "images/s", "times plain", "of the limit", "MFU", "GiB at most"]
    limits = "; ".join(
        f"{step_name(point)}: {spread(point['limit']['tflops']).text(0)}, {OPERATIONS[point['limit']['operation']]}"
        for point in points
    )
    sentences = [
        f"Limit in the same run, TFLOP/s: {limits}. MFU: operations as published (two views, two encoders), over the"
        " data sheet's rate for bf16.",
        *(profile_text(point) for point in points if "profile" in point),
        *(data_text(point) for point in points if "data" in point),
    ]
    return "\n\n".join(["### Pre-training step", table(head, rows), *sentences]) + "\n"


def profile_text(point: dict) -> str:
    profile = point["profile"]
    shares = ", ".join(
        f"{kind} {100 * share:.0f} %" for kind, share in profile["shares_of_busy"].items() if share >= LEAST_SHARE
    )
    return (
        f"Where the time of {step_name(point)}, {profile['variant']}, goes: the GPU is busy"
        f" {100 * profile['busy']:.0f} % of it, of which {shares}."
    )


def data_text(point: dict) -> str:
    """Photographs from disk against views that lie ready."""
    data = point["data"]
    ready, read = (spread(data["images_per_second"][how]).text(0) for how in ("ready", "data"))
    return (
        f"{step_name(point)}, {data['variant']}, on photographs from disk, {data['workers']} workers: {read} images/s"
        f" against {ready} on views that lie ready, {100 * data['slower_than_ready']:.0f} % slower. The loader alone"
        f" gives {data['loader_alone']:.0f} images/s, the augmentation on the GPU {data['augmentation_alone']:.0f}."
    )


def updates_section(results: dict) -> str:
    rows = []
    for point in result(results, "updates")["points"]:
        seconds = point["seconds"]
        rates = spread([point["limit_bytes"] / taken / 1e9 for taken in seconds["limit"]])
        rows.append(
            [
                f"{point['update']}, {NAMES[point['backbone']]}",
                *(spread(seconds[who]).text(1, 1e3) for who in ("plain", "ours")),
                ratio(*plain_and_ours(seconds)).text(1),
                rates.text(1),
                *(update_reached(point, who).percent() for who in ("plain", "ours")),
            ]
        )
    head = ["update", "loop, ms", "ours, ms", "times the loop", "limit, GB/s", "loop reaches", "ours reaches"]
    return f"### Updates of the weights\n\n{table(head, rows)}\n"


def memory_section(results: dict) -> str:
    memory = result(results, "memory")
    plain, cached = ({point["batch"]: point for point in memory[kind]} for kind in ("plain", "cached"))
    rows = [
        [
            str(batch),
            *(
                f"{kind[batch][key]:.2f}" if batch in kind else "–"
                for kind in (plain, cached)
                for key in ("peak_gib", "counted_gib")
            ),
        ]
        for batch in sorted(plain | cached)
    ]
    head = ["batch", "plain step, GiB", "least", "gradient cache, GiB", "least"]
    cost = memory["cost"]
    return (
        f"### Memory\n\n{NAMES[memory['backbone']]} in {PRECISIONS[memory['mixed_precision']]}, chunks of"
        f" {memory['chunk_size']}: peak of a step above weights, gradients and moments, and what views and the tensors"
        f" that autograd must keep come to, counted.\n\n{table(head, rows)}\n\nAn image costs"
        f" {ratio(cost['cpu_seconds']['cached'], cost['cpu_seconds']['plain']).text()} times the plain step's CPU time"
        f" (batch {cost['batch']}).\n"
    )


def inference_section(results: dict) -> str:
    """Ways to the same outputs."""
    points = result(results, "inference")["points"]
    rows = []
    for point in points:
        for way, figures in point["variants"].items():
            limit, reached = "–", "–"
            if "fraction_of_limit" in figures:
                limit, reached = f"{figures['limit_ms_per_image']:.1f}", f"{100 * figures['fraction_of_limit']:.0f} %"
            rows.append(
                [
                    f"{NAMES[point['model']]}, {point['task']}",
                    way,
                    Spread(*figures["ms_per_image"].values()).text(1),
                    Spread(*figures["times_the_pipeline"].values()).text(),
                    limit,
                    reached,
                    agreement_text(figures.get("agreement")),
                ]
            )
    head = ["model", "way", "ms per image", "times the pipeline", "limit, ms", "reached", "against its results"]
    return (
        f"### Inference\n\n{points[0]['images']} photographs, one core, CPU time. The limit is decoding them, and the"
        f" model's operations at the rate of a large matrix product.\n\n{table(head, rows)}\n"
    )


def agreement_text(agreement: dict | None) -> str:
    """How far the results are from the pipeline's."""
    if agreement is None:
        return "–"
    if "relative_distance" in agreement:
        return f"{agreement['relative_distance']:.1g} away"
    same, largest = agreement["same_first_label"], agreement["largest_score_difference"]
    return f"{100 * same:.0f} % same label, scores within {largest:.1g}"


def scaling_section(results: dict) -> str:
    scaling = result(results, "scaling")
    assumed = scaling["assumptions"]
    networks = {"InfiniBand": assumed["infiniband"], "100 GbE": assumed["ethernet"]}
    rows = [
        [
            row["model"],
            str(row["processes"]),
            str(row["batch_size"]),
            f"{row['compute_ms'] / 1e3:.1f}",
            f"{row['sent_mb']:.0f}",
            *(
                f"{100 * row['compute_ms'] / row[f'{network}, {how} overlap, ms']:.1f} %"
                for network in networks
                for how in ("without", "with")
            ),
        ]
        for row in scaling["rows"]
        if row["processes"] in SHOWN_PROCESSES
    ]
    head = ["model", "processes", "images each", "computation, s", "MB sent"]
    head += [f"{rate:g} GB/s, {how} overlap" for rate in networks.values() for how in ("without", "with")]
    text = (
        "### Scaling\n\n**Derived, not measured:** the step measured above (bf16), shared by processes with a device"
        " each, and the bytes that they exchange, counted, at assumed"
        f" {assumed['nvlink']:g} GB/s inside a node of 8, the rates of the table's head between nodes, and"
        f" {assumed['latency']:g} µs an exchange. The share of the step that is computation, global batch"
        f" {scaling['rows'][0]['batch_size']}:\n\n{table(head, rows)}\n"
    )
    check = result(results, "scaling_check")
    if check is None:
        return text
    if "impossible" in check:
        return f"{text}\nNot held against a measurement here: {check['impossible']}.\n"
    rows = [
        [
            str(row["megabits_per_second"]),
            *(
                f"{row[key]:.0f}"
                for key in (
                    "measured_ms",
                    "foretold_without_overlap_ms",
                    "foretold_with_overlap_ms",
                    "foretold_from_unlimited_ms",
                )
            ),
        ]
        for row in check["rates"]
    ]
    head = [
        "cable, Mbit/s",
        "measured, ms",
        "foretold without overlap",
        "with overlap",
        "from the cable without limit",
    ]
    return (
        f"{text}\n**Measured**, to hold this way of foretelling against: a small ViT on two hosts of one core each,"
        f" joined by a cable, {check['sent_mb']:.1f} MB a step. One process takes"
        f" {check['one_process_ms']:.0f} ms, two hosts without limit"
        f" {check['two_hosts_without_limit_ms']:.0f} ms.\n\n{table(head, rows)}\n"
    )


def runs_section(results: dict) -> str:
    """Commands, dates and times of all parts; a dash where a part was run by hand and that was not recorded."""
    rows = [
        [
            name,
            f"`{run['command']}`",
            run["date"],
            f"`{run['revision']}`",
            *(
                "–" if run[key] is None else f"{run[key]:.{digits}f}"
                for key, digits in (("load_before", 1), ("seconds", 0))
            ),
        ]
        for name, run in ((name, part["run"]) for name, part in results["parts"].items())
    ]
    taken = [part["run"]["seconds"] for part in results["parts"].values()]
    total = "" if None in taken else f"All parts together took {sum(taken) / 60:.0f} minutes.\n\n"
    return f"### Runs\n\n{total}{table(['part', 'command', 'date', 'revision', 'load before', 's'], rows)}\n"
