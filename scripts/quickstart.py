"""MoCo v3 end to end on handwritten digits, in minutes and without a download: `make quickstart`."""

import argparse
import signal
import sys
from pathlib import Path

import mocov3_cli


mocov3_cli.wait_passively()  # before torch is imported
with mocov3_cli.ended_by_signals("SIGINT", "SIGTERM"):
    from transformers import pipeline
    from transformers.utils.logging import disable_progress_bar

    from mocov3_hf import MoCoV3Model
    from mocov3_hf.data.digits import write_digits
    from mocov3_hf.data.labeled import open_labeled
    from mocov3_hf.evaluation import knn
    from mocov3_hf.evaluation.classifier import build_classifier
    from mocov3_hf.evaluation.features import labeled_features
    from mocov3_hf.evaluation.linear import fit_linear_classifier
    from mocov3_hf.option_values import resume_command
    from mocov3_hf.pretraining import build, plan, pretrain, recipe
    from mocov3_hf.processing import build_image_processor
    from mocov3_hf.report.write import main as report
    from mocov3_hf.reporting import reporting
    from mocov3_hf.run_folder import list_checkpoints, step_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    options, overrides = parser.parse_known_args()  # the rest, as --max_steps 20, goes to the recipe
    disable_progress_bar()
    digits, pretrained = write_digits(options.output_dir / "digits"), options.output_dir / "pretrained"
    train, test = (open_labeled(str(digits), split=split) for split in ("train", "test"))

    command = ["--recipe", "quickstart", "--dataset_name", str(digits), "--output_dir", str(pretrained)]
    chosen = recipe.parse([*command, "--overwrite_output_dir", *overrides])
    before = knn.evaluate_knn(build.build_model(chosen), train, test, k=[10], progress=False)
    pretrain.run_recipe(chosen, resume_command(sys.argv[1:]))
    check_finished(pretrained, plan.make_plan(chosen, len(train), 1).total_steps)
    after = knn.run(knn.KNNOptions(model=str(pretrained), dataset_name=str(digits), k=[10]))

    model = MoCoV3Model.from_pretrained(pretrained)
    features, held_out = (labeled_features(model, images, progress=False) for images in (train, test))
    linear = fit_linear_classifier(features.features, features.labels)
    folder = options.output_dir / "classifier"
    build_classifier(model, linear, train.class_names).save_pretrained(folder)
    build_image_processor(model.config.backbone_config.image_size).save_pretrained(folder)

    print(f"kNN accuracy on {len(test)} held-out digits: {before['knn10_top1']:.3f} before pre-training")
    print(f"                                       {after['knn10_top1']:.3f} after")
    print(f"linear classifier on frozen features:  {linear.accuracy(held_out.features, held_out.labels):.3f}")
    print(f'pipeline("image-classification", model="{folder}"):')
    files = sorted((digits / "test").glob("*/*.png"))[:: max(1, len(test) // 8)]
    for file, answer in zip(
        files, pipeline("image-classification", model=str(folder))(list(map(str, files))), strict=True
    ):
        print(f"  {file.relative_to(digits)}: a {answer[0]['label']} ({answer[0]['score']:.2f})")
    report([str(pretrained), "--dataset_name", str(digits)])


def check_finished(folder: Path, total_steps: int) -> None:
    """End the process with a line if pre-training was stopped by a signal."""
    done = max(map(step_of, list_checkpoints(folder)), default=0)
    if done < total_steps:
        print(f"the quickstart is unfinished, after {done} of {total_steps} steps: it has no result", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    try:
        with reporting():
            main()
    except KeyboardInterrupt:
        print("the quickstart is unfinished, stopped by SIGINT: start it again", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
