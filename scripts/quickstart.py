"""MoCo v3 end to end on handwritten digits, in minutes and without a download: `make quickstart`."""

import argparse
from pathlib import Path

from transformers import pipeline
from transformers.utils.logging import disable_progress_bar

from mocov3_hf import MoCoV3Model
from mocov3_hf.data.digits import write_digits
from mocov3_hf.data.labeled import open_labeled
from mocov3_hf.evaluation.classifier import build_classifier
from mocov3_hf.evaluation.features import labeled_features
from mocov3_hf.evaluation.knn import evaluate_knn
from mocov3_hf.evaluation.linear import fit_linear_classifier
from mocov3_hf.pretraining import build, loop, recipe
from mocov3_hf.processing import build_image_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    options, overrides = parser.parse_known_args()  # the rest, as --max_steps 20, goes to the recipe
    disable_progress_bar()
    digits, pretrained = write_digits(options.output_dir / "digits"), options.output_dir / "pretrained"
    train, test = (open_labeled(str(digits), split=split) for split in ("train", "test"))

    command = ["--recipe", "quickstart", "--dataset_name", str(digits), "--output_dir", str(pretrained)]
    command += ["--overwrite_output_dir", *overrides]
    before = evaluate_knn(build.build_model(recipe.parse(command)), train, test, k=[10], progress=False)
    loop.main(command)
    model = MoCoV3Model.from_pretrained(pretrained)
    after = evaluate_knn(model, train, test, k=[10], progress=False)

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


if __name__ == "__main__":
    main()
