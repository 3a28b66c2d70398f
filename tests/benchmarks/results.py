"""Benchmark results with round numbers, to check tables by hand."""


def small_results() -> dict:
    """All parts; ours is about twice as fast as the plain implementation and half as fast as the limit."""
    parts = {
        "limits_before": limits(100.0),
        "data_path": {
            "images": 10,
            "mean_file_bytes": 110_000,
            "one_core": {"cpu_seconds": {"classic": [4.0, 5.0], "ours": [2.0, 2.0], "decode": [1.0, 1.0]}},
            "loaders": {
                "2 workers": {
                    "wall_seconds_per_image": {"classic": [0.04, 0.04], "ours": [0.01, 0.01]},
                    "cpu_seconds_per_image": {"classic": [0.06, 0.06], "ours": [0.02, 0.02]},
                }
            },
        },
        "step": {
            "points": [
                step("vit_small", "no", [8.0, 12.0, 8.0], [4.0, 4.0, 4.0]),
                step("vit_small", "bf16", [6.0, 6.0, 6.0], [4.0, 4.0, 4.0]),
                step("resnet50", "no", [5.0, 5.0, 5.0], [4.0, 4.0, 4.0]),
            ]
        },
        "updates": {
            "points": [
                {
                    "update": "AdamW",
                    "backbone": "vit_small",
                    "bytes": 7e9,
                    "limit_bytes": 3.5e9,
                    "seconds": {"plain": [10.0], "ours": [4.0], "limit": [1.0]},
                }
            ]
        },
        "memory": {
            "backbone": "vit_small",
            "mixed_precision": "bf16",
            "chunk_size": 32,
            "plain": [{"batch": 64, "peak_gib": 6.94, "counted_gib": 4.5}],
            "cached": [
                {"batch": 64, "peak_gib": 2.01, "counted_gib": 1.5},
                {"batch": 256, "peak_gib": 2.44, "counted_gib": 1.75},
            ],
            "cost": {"batch": 64, "cpu_seconds": {"plain": [10.0], "cached": [11.0]}},
        },
        "inference": {
            "points": [
                {
                    "model": "vit_small",
                    "task": "classification",
                    "images": 8,
                    "variants": {
                        "pipeline": {"ms_per_image": same(80.0), "times_the_pipeline": same(1.0)},
                        "ours, bfloat16": {
                            "ms_per_image": {"median": 20.0, "min": 16.0, "max": 40.0},
                            "times_the_pipeline": {"median": 4.0, "min": 2.0, "max": 5.0},
                            "limit_ms_per_image": 10.0,
                            "fraction_of_limit": 0.5,
                            "agreement": {"same_first_label": 1.0, "largest_score_difference": 0.003},
                        },
                    },
                }
            ],
        },
        "scaling": {
            "assumptions": {"nvlink": 10, "infiniband": 1.25, "ethernet": 0.125, "latency": 30},
            "rows": [
                {
                    "model": "ViT-S",
                    "processes": processes,
                    "batch_size": 4096 // processes,
                    "compute_ms": 8000.0 / processes,
                    "sent_mb": 100.0,
                    "InfiniBand, without overlap, ms": 16000.0 / processes,
                    "InfiniBand, with overlap, ms": 10000.0 / processes,
                    "100 GbE, without overlap, ms": 80000.0 / processes,
                    "100 GbE, with overlap, ms": 32000.0 / processes,
                }
                for processes in (1, 4, 8)
            ],
        },
        "scaling_check": {"impossible": "no hosts here"},
        "limits_after": limits(80.0),
    }
    run = {
        "command": "python benchmarks/x.py",
        "date": "2026-01-02",
        "revision": "abc",
        "load_before": 0.1,
        "seconds": 60,
    }
    return {
        "machine": "small",
        "device": "A processor",
        "device_type": "cpu",
        "cpu": "A processor",
        "cores": 2,
        "quick": False,
        "images": "made by photos.py",
        "python": "3.11.0",
        "system": "Linux x86_64",
        "versions": {"torch": "2.0"},
        "parts": {name: {"run": run, "result": result} for name, result in parts.items()},
        "failed": {},
        "drift": {"gemm_no": 0.8},
        "seconds": 420.0,
    }


def same(value: float) -> dict:
    return {"median": value, "min": value, "max": value}


def limits(rate: float) -> dict:
    return {"limits": {"gemm_no": {"unit": "GFLOP/s", "rates": [rate, rate]}}}


def step(backbone: str, mixed_precision: str, plain: list[float], ours: list[float]) -> dict:
    """16 images of 10 and 5 GFLOP at a limit of 40 GFLOP/s: at least 4 s for the plain step and 2 s for ours."""
    return {
        "backbone": backbone,
        "mixed_precision": mixed_precision,
        "batch": 16,
        "acceleration": "nothing",
        "cpu_seconds": {"plain": plain, "ours": ours},
        "limit": {
            "operation": "Gemm" if backbone != "resnet50" else "Convolution",
            "flop": 80e9,
            "seconds": [2.0] * 3,
        },
        "flop_per_image": {"plain": 10e9, "ours": 5e9},
    }


def gpu_results() -> dict:
    """A GPU with the step only, run by hand. The compiled step is 3× the plain one and at half of the limit."""
    variants = {
        "plain": gpu_variant([100.0, 100.0], 0.25, 0.2),
        "ours": gpu_variant([200.0, 150.0], 0.4375, 0.35),
        "compiled": gpu_variant([300.0, 300.0], 0.5, 0.45),
    }
    point = {
        "backbone": "vit_small",
        "mixed_precision": "bf16",
        "batch": 256,
        "limit": {"operation": "Gemm", "tflops": [600.0, 700.0]},
        "variants": variants,
        "profile": {
            "variant": "compiled",
            "busy": 0.75,
            "shares_of_busy": {"matrix products": 0.6, "attention": 0.395, "copies": 0.005},
        },
        "data": {
            "variant": "compiled",
            "workers": 16,
            "images_per_second": {"ready": [300.0, 300.0], "data": [240.0, 240.0]},
            "slower_than_ready": 0.2,
            "loader_alone": 400.0,
            "augmentation_alone": 500.0,
        },
    }
    other = {"backbone": "resnet50", "limit": {"operation": "Convolution", "tflops": [600.0]}}
    shared = {key: value for key, value in point.items() if key not in ("profile", "data")}
    results = small_results()
    run = {**results["parts"]["step"]["run"], "load_before": None, "seconds": None}
    points = [point, {**shared, **other}]
    return {
        **results,
        "machine": "gpu",
        "device": "A GPU",
        "device_type": "cuda",
        "parts": {"step": {"run": run, "result": {"points": points}}},
    }


def gpu_variant(rates: list[float], of_limit: float, mfu: float) -> dict:
    return {
        "images_per_second": rates,
        "median": sum(rates) / len(rates),
        "of_limit": of_limit,
        "mfu": mfu,
        "peak_memory_gib": 10.0,
    }
