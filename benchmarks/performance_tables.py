"""Markdown tables of docs/performance.md: pure functions of the results of one machine."""

from .performance_numbers import (
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
MIN_SHARE = 0.01  # kinds of kernels below this share are not listed


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
        f"## {where}\n\n![speedup, fraction of the limit, memory](performance/{results['machine']}.svg)\n\n"
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
        "### Limits\n\nMeasured before and after all parts. A drift other than 1 means that the machine itself"
        f" changed.\n\n{table(['operation', 'unit', 'before', 'after', 'drift'], rows)}\n"
    )


def data_path_section(results: dict) -> str:
    data = result(results, "data_path")
    core = data["one_core"]
    seconds, images = core["cpu_seconds"], data["images"]
    names = {
        "classic": "classic: PIL and torchvision transforms",
        "ours": "ours",
        "decode": "decoding only (the limit)",
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
        f"### Data loading\n\nBoth views of {images} photographs of {data['mean_file_bytes'] / 1e3:.0f} KB on average,"
        f" one core, CPU time.\n\n{table(['', 'ms per image', 'speedup', 'fraction of the limit'], rows)}\n"
    )
    rows = [
        [
            workers if workers != "1 workers" else "1 worker",
            *(
                spread([1 / taken for taken in measured["wall_seconds_per_image"][who]]).text(0)
                for who in ("classic", "ours")
            ),
            ratio(*(measured["wall_seconds_per_image"][who] for who in ("classic", "ours"))).text(),
            ratio(*(measured["cpu_seconds_per_image"][who] for who in ("classic", "ours"))).text(),
        ]
        for workers, measured in data["loaders"].items()
    ]
    head = ["whole DataLoader", "classic, images/s", "ours, images/s", "speedup, wall time", "speedup, CPU time"]
    text += f"\n{table(head, rows)}\n"
    if "device_stage" in data:
        stage = data["device_stage"]
        text += (
            f"\nThe photometric stage on {stage['device']} augments both views of {stage['images_per_second']:.0f}"
            f" images/s, which takes {100 * stage['share_of_step']:.1f} % of a ViT-S step.\n"
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
    head = ["step", "plain, s", "ours, s", "speedup", "limit, GFLOP/s", "plain, of limit", "ours, of limit"]
    batches = ", ".join(sorted({str(point["batch"]) for point in points}, key=int))
    counted = "; ".join(
        f"{NAMES[point['backbone']]} {point['flop_per_image']['plain'] / 1e9:.1f} GFLOP per image"
        f" (ours {point['flop_per_image']['ours'] / 1e9:.1f})"
        for point in points
        if point["mixed_precision"] == points[0]["mixed_precision"]
    )
    choices = "; ".join(f"{step_name(point)}: {point['acceleration']}" for point in points)
    return (
        f"### Pre-training step\n\nBatch {batches}, one core, CPU time. {counted}.\n\n{table(head, rows)}\n\n"
        f"Settings of ours: {choices}.\n"
    )


def gpu_step_section(points: list[dict]) -> str:
    rows = []
    for point in points:
        for name, measured in point["variants"].items():
            rows.append(
                [
                    step_name(point),
                    str(point["batch"]),
                    name,
                    spread(measured["images_per_second"]).text(0),
                    gpu_times_plain(point, name).text(),
                    gpu_step_reached(point, name).percent(),
                    "–" if measured["mfu"] is None else f"{100 * measured['mfu']:.1f} %",
                    "–" if measured["peak_memory_gib"] is None else f"{measured['peak_memory_gib']:.1f}",
                ]
            )
    head = ["step", "batch", "variant", "images/s", "speedup", "of limit", "MFU", "peak GiB"]
    limits = "; ".join(
        f"{step_name(point)}: {spread(point['limit']['tflops']).text(0)}, {OPERATIONS[point['limit']['operation']]}"
        for point in points
    )
    sentences = [
        f"Limits in the same run, TFLOP/s: {limits}. MFU: operations as published (two views, two encoders), divided"
        " by the bf16 peak of the data sheet.",
        *(profile_text(point) for point in points if "profile" in point),
        *(data_text(point) for point in points if "data" in point),
    ]
    return "\n\n".join(["### Pre-training step", table(head, rows), *sentences]) + "\n"


def profile_text(point: dict) -> str:
    profile = point["profile"]
    shares = ", ".join(
        f"{kind} {100 * share:.0f} %" for kind, share in profile["shares_of_busy"].items() if share >= MIN_SHARE
    )
    return (
        f"Profile of {step_name(point)}, {profile['variant']}: the GPU is busy {100 * profile['busy']:.0f} % of the"
        f" time. Shares of the busy time: {shares}."
    )


def data_text(point: dict) -> str:
    """Training on photographs from disk, compared with views that are already in memory."""
    data = point["data"]
    ready, read = (spread(data["images_per_second"][how]).text(0) for how in ("ready", "data"))
    return (
        f"{step_name(point)}, {data['variant']}, on photographs from disk, {data['workers']} workers: {read} images/s"
        f" instead of {ready} on views in GPU memory, {100 * data['slower_than_ready']:.0f} % slower. The loader alone"
        f" reaches {data['loader_alone']:.0f} images/s, the augmentation on the GPU {data['augmentation_alone']:.0f}."
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
    head = ["step", "loop, ms", "ours, ms", "speedup", "limit, GB/s", "loop, of limit", "ours, of limit"]
    return f"### EMA and optimizer steps\n\n{table(head, rows)}\n"


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
    head = ["batch", "plain step, GiB", "lower bound", "gradient cache, GiB", "lower bound"]
    cost = memory["cost"]
    return (
        f"### Memory\n\n{NAMES[memory['backbone']]} in {PRECISIONS[memory['mixed_precision']]}, chunks of"
        f" {memory['chunk_size']}: peak memory of a step beyond weights, gradients and optimizer state. The lower"
        f" bound is the size of the views and of the tensors that autograd must keep.\n\n{table(head, rows)}\n\nThe"
        f" gradient cache takes {ratio(cost['cpu_seconds']['cached'], cost['cpu_seconds']['plain']).text()} times the"
        f" CPU time of the plain step (batch {cost['batch']}).\n"
    )


def inference_section(results: dict) -> str:
    """Our predictors and the transformers pipelines, on the same images."""
    points = result(results, "inference")["points"]
    rows = []
    for point in points:
        for way, measured in point["variants"].items():
            limit, reached = "–", "–"
            if "fraction_of_limit" in measured:
                limit = f"{measured['limit_ms_per_image']:.1f}"
                reached = f"{100 * measured['fraction_of_limit']:.0f} %"
            rows.append(
                [
                    f"{NAMES[point['model']]}, {point['task']}",
                    way,
                    Spread(*measured["ms_per_image"].values()).text(1),
                    Spread(*measured["times_the_pipeline"].values()).text(),
                    limit,
                    reached,
                    agreement_text(measured.get("agreement")),
                ]
            )
    head = ["model", "method", "ms per image", "speedup", "limit, ms", "of limit", "agreement with the pipeline"]
    return (
        f"### Inference\n\n{points[0]['images']} photographs, one core, CPU time. The limit is decoding plus the"
        f" model's operations at the rate of a large matrix product.\n\n{table(head, rows)}\n"
    )


def agreement_text(agreement: dict | None) -> str:
    """How closely the results agree with the pipeline's."""
    if agreement is None:
        return "–"
    if "relative_distance" in agreement:
        return f"relative distance {agreement['relative_distance']:.1g}"
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
    head = ["model", "processes", "images per process", "computation, s", "MB sent"]
    head += [f"{rate:g} GB/s, {how} overlap" for rate in networks.values() for how in ("without", "with")]
    text = (
        "### Scaling\n\n**Estimated, not measured**, from the step time above (bf16), one device per process, and the"
        f" number of bytes that processes exchange. Assumed are {assumed['nvlink']:g} GB/s inside a node of 8, the"
        f" bandwidths in the table's header between nodes, and a latency of {assumed['latency']:g} µs per collective."
        " The table shows the computation as a share of the step time, at a global batch of"
        f" {scaling['rows'][0]['batch_size']}:\n\n"
        f"{table(head, rows)}\n"
    )
    check = result(results, "scaling_check")
    if check is None:
        return text
    if "impossible" in check:
        return f"{text}\nNot compared with a measurement on this machine: {check['impossible']}.\n"
    rows = [
        [
            str(row["megabits_per_second"]),
            *(
                f"{row[key]:.0f}"
                for key in (
                    "measured_ms",
                    "estimated_without_overlap_ms",
                    "estimated_with_overlap_ms",
                    "estimated_from_unlimited_ms",
                )
            ),
        ]
        for row in check["rates"]
    ]
    head = [
        "bandwidth, Mbit/s",
        "measured, ms",
        "estimated without overlap",
        "with overlap",
        "from the unlimited link",
    ]
    return (
        f"{text}\nTo validate the estimate, the same formula is compared with a **measurement**: a small ViT on two"
        f" hosts of one core each, connected by a virtual link, {check['sent_mb']:.1f} MB per step. A step takes"
        f" {check['one_process_ms']:.0f} ms on one process and {check['two_hosts_without_limit_ms']:.0f} ms on two"
        f" hosts with unlimited bandwidth.\n\n{table(head, rows)}\n"
    )


def runs_section(results: dict) -> str:
    """Commands, dates and durations of all parts; a dash where they were not recorded."""
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
    return f"### Runs\n\n{total}{table(['part', 'command', 'date', 'revision', 'load before', 'seconds'], rows)}\n"
