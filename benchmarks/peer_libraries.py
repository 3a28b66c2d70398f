"""The data paths that peers.py compares: JPEG files to both views of MoCo v3, by each library in its own idiom.

A library is imported only when its class is used, so that one that is not installed is no obstacle to the others. Each
is written as its documentation shows; what it does in another way than the paper is stated in `differences`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset


SIZE, SCALE, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER, JITTER_PROBABILITY, GRAY_PROBABILITY, SIGMA = (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (0.1, 2.0)
# Probabilities of blur and of solarize, by view.
VIEWS = ((1.0, 0.0), (0.1, 0.2))
Pair = tuple  # of both views: of an image (C, S, S), or of a batch (B, C, S, S)


class Library:
    """
    One way from files to views. Subclasses define the dataset of a library and where its items have the two views.

    Args:
        folder: With one subfolder of JPEG files.
        batch: Images of a batch of the loader.
    """

    package = ""  # that must be installed
    decoder = "PIL"
    resize = "PIL, antialiased"
    differences = ""  # from the augmentation of MoCo v3

    def __init__(self, folder: str, batch: int):
        self.folder, self.batch = folder, batch
        self.paths = [str(path) for path in sorted(Path(folder).glob("*/*.jpg"))]
        self.kept: dict[str, object] = {}

    def dataset(self, task: str) -> Dataset:
        raise NotImplementedError

    def pair(self, item) -> Pair:
        return item

    def keep(self, name: str, make: Callable[[], object]):
        """What `make` returned when it was called first under this name."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def items(self, task: str) -> Iterator[Pair]:
        dataset = self.keep(task, lambda: self.dataset(task))
        for index in range(len(self.paths)):
            yield self.pair(dataset[index])

    def views(self) -> Iterator[Pair]:
        yield from self.items("views")

    def crops(self) -> Iterator[Pair]:
        yield from self.items("crops")

    def make_loader(self) -> DataLoader:
        dataset = self.dataset("views")
        return DataLoader(dataset, self.batch, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True)

    def loader(self) -> Iterator[Pair]:
        for item in self.keep("loader", self.make_loader):
            yield self.pair(item)


class Ours(Library):
    package, decoder = "mocov3_hf", "torchvision"
    resize = "torch, antialiased"

    def __init__(self, folder: str, batch: int):
        super().__init__(folder, batch)
        from data_path import Files

        from mocov3_hf.data.photometric import PhotometricStage
        from mocov3_hf.data.views import two_views

        self.files, self.settings, self.stage = Files(self.paths), two_views(image_size=SIZE), PhotometricStage()
        self.epoch = 0

    def blocks(self) -> Iterator[dict]:
        from mocov3_hf.data.sources import MapBatch
        from mocov3_hf.data.views import make_views

        self.epoch += 1
        for ids in torch.arange(len(self.paths)).split(self.batch):
            yield make_views(MapBatch(self.files, ids), self.settings, 0, self.epoch)

    def finished(self, block: dict) -> Pair:
        return tuple(self.stage(*view) for view in zip(block["pixels"], block["parameters"], strict=True))

    def views(self) -> Iterator[Pair]:
        yield from map(self.finished, self.blocks())

    def crops(self) -> Iterator[Pair]:
        for block in self.blocks():
            yield tuple(block["pixels"])

    def loader(self) -> Iterator[Pair]:
        from mocov3_hf.data.loader import TwoViewLoader
        from mocov3_hf.data.sources import open_source

        def make():
            source = open_source(self.folder)
            return TwoViewLoader(source, self.settings, global_batch_size=self.batch, num_workers=1)

        self.epoch += 1
        yield from map(self.finished, self.keep("loader", make).epoch(self.epoch))


class Plain(Library):
    """The classic pipeline of PIL and torchvision transforms."""

    package = "torchvision"

    def dataset(self, task: str) -> Dataset:
        from data_path import Classic
        from torchvision.transforms import RandomResizedCrop

        dataset = Classic(self.paths)
        if task == "crops":
            dataset.views = (RandomResizedCrop(SIZE, SCALE, RATIO),) * 2
        return dataset


class Lightly(Library):
    package = "lightly"

    def dataset(self, task: str) -> Dataset:
        from lightly.data import LightlyDataset
        from lightly.transforms.byol_transform import BYOLTransform
        from lightly.transforms.multi_view_transform import MultiViewTransform
        from torchvision.transforms.v2 import RandomResizedCrop

        crop = RandomResizedCrop(SIZE, SCALE, RATIO)
        transform = BYOLTransform() if task == "views" else MultiViewTransform([crop, crop])
        return LightlyDataset(self.folder, transform=transform)

    def pair(self, item) -> Pair:
        return tuple(item[0])


class LightlyTrain(Library):
    """Its transform of DINO without local views, which is that of MoCo v3 with other numbers."""

    package, decoder, resize = "lightly-train", "torchvision", "OpenCV, INTER_AREA"

    def dataset(self, task: str) -> Dataset:
        from lightly_train._data.image_dataset import ImageDataset
        from lightly_train._methods.dino.dino_transform import (
            DINOColorJitterArgs,
            DINORandomResizedCropArgs,
            DINOTransform,
            DINOTransformArgs,
        )
        from lightly_train._transforms.random_resized_crop import get_random_resized_crop

        crop = DINORandomResizedCropArgs(min_scale=SCALE[0])
        names = ("brightness", "contrast", "saturation", "hue")
        jitter = DINOColorJitterArgs(strength=1.0, **dict(zip(names, JITTER, strict=True)))
        arguments = DINOTransformArgs(local_view=None, random_resize=crop, color_jitter=jitter, num_channels=3)
        transform = DINOTransform(arguments)
        if task == "crops":
            resized = get_random_resized_crop((SIZE, SIZE), crop)

            def transform(image: dict) -> list[dict]:
                return [resized(**image), resized(**image)]

        return ImageDataset(None, self.paths, transform, num_channels=3)

    def pair(self, item) -> Pair:
        return tuple(item["views"])


class StablePretraining(Library):
    package = "stable-pretraining"

    def dataset(self, task: str) -> Dataset:
        import stable_pretraining as spt
        from stable_pretraining.data import transforms
        from torchvision.datasets import ImageFolder

        def view(blur: float, solarize: float) -> transforms.Compose:
            return transforms.Compose(
                transforms.RandomResizedCrop((SIZE, SIZE), scale=SCALE, ratio=RATIO),
                transforms.ColorJitter(*JITTER, p=JITTER_PROBABILITY),
                transforms.RandomGrayscale(p=GRAY_PROBABILITY),
                transforms.PILGaussianBlur(sigma=SIGMA, p=blur),
                transforms.RandomSolarize(threshold=128, p=solarize),
                transforms.RandomHorizontalFlip(p=0.5),
                transforms.ToImage(mean=MEAN, std=STD),
            )

        views = [view(*probabilities) for probabilities in VIEWS]
        if task == "crops":
            views = [transforms.RandomResizedCrop((SIZE, SIZE), scale=SCALE, ratio=RATIO)] * 2
        transform = transforms.MultiViewTransform(views)
        return spt.data.FromTorchDataset(ImageFolder(self.folder), ["image", "label"], transform=transform)

    def pair(self, item) -> Pair:
        return tuple(view["image"] for view in item["views"])


class Albumentations(Library):
    package, decoder, resize = "albumentations", "OpenCV", "OpenCV, INTER_LINEAR, not antialiased"
    names = ("brightness", "contrast", "saturation", "hue", "sigma_limit")

    def dataset(self, task: str) -> Dataset:
        import albumentations
        import cv2
        from albumentations.pytorch import ToTensorV2

        cv2.setNumThreads(0)
        ranges = [(1 - width, 1 + width) for width in JITTER[:3]] + [(-JITTER[3], JITTER[3])]
        jitter, sigma = dict(zip(self.names, ranges, strict=False)), {self.names[4]: SIGMA}
        crop = albumentations.RandomResizedCrop((SIZE, SIZE), scale=SCALE, ratio=RATIO)

        def view(blur: float, solarize: float) -> albumentations.Compose:
            return albumentations.Compose(
                [
                    crop,
                    albumentations.ColorJitter(**jitter, p=JITTER_PROBABILITY),
                    albumentations.ToGray(p=GRAY_PROBABILITY),
                    albumentations.GaussianBlur(**sigma, p=blur),
                    albumentations.Solarize(threshold_range=(0.5, 0.5), p=solarize),
                    albumentations.HorizontalFlip(p=0.5),
                    albumentations.Normalize(MEAN, STD),
                    ToTensorV2(),
                ]
            )

        views = [view(*probabilities) for probabilities in VIEWS]
        if task == "crops":
            views = [albumentations.Compose([crop])] * 2
        return OpenCVImages(self.paths, views)


class OpenCVImages(Dataset):
    """Files read with OpenCV, as in the documentation of albumentations."""

    def __init__(self, paths: list[str], views: list[Callable]):
        self.paths, self.views = paths, views

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pair:
        import cv2

        image = cv2.cvtColor(cv2.imread(self.paths[index]), cv2.COLOR_BGR2RGB)
        return tuple(view(image=image)["image"] for view in self.views)


class AlbumentationsX(Albumentations):
    package = "albumentationsx"
    names = ("brightness_range", "contrast_range", "saturation_range", "hue_range", "sigma_range")


class Timm(Library):
    package = "timm"
    differences = "no solarize"

    def dataset(self, task: str) -> Dataset:
        from timm.data import ImageDataset
        from timm.data.transforms import RandomResizedCropAndInterpolation
        from timm.data.transforms_factory import transforms_imagenet_train

        views = [
            transforms_imagenet_train(
                SIZE,
                scale=SCALE,
                ratio=RATIO,
                interpolation="bilinear",
                color_jitter=JITTER,
                color_jitter_prob=JITTER_PROBABILITY,
                grayscale_prob=GRAY_PROBABILITY,
                gaussian_blur_prob=blur,
                mean=MEAN,
                std=STD,
            )
            for blur, _ in VIEWS
        ]
        if task == "crops":
            views = [RandomResizedCropAndInterpolation(SIZE, SCALE, RATIO, "bilinear")] * 2
        return ImageDataset(self.folder, transform=lambda image: tuple(view(image) for view in views))

    def make_loader(self) -> DataLoader:
        from timm.data import create_loader

        dataset = self.dataset("views")
        transform = dataset.transform
        loader = create_loader(
            dataset, SIZE, self.batch, is_training=True, num_workers=1, use_prefetcher=False, persistent_workers=True
        )
        dataset.transform = transform  # create_loader has replaced it by one view's
        return loader

    def pair(self, item) -> Pair:
        return tuple(item[0])


class Dali(Library):
    """A pipeline with conditional execution and one thread. It repeats images to fill the last batch."""

    package, decoder, resize = "nvidia-dali-cuda130", "DALI", "DALI, antialiased"
    differences = "jitter in a fixed order, contrast around mid-gray"

    def pipeline(self, task: str):
        from nvidia.dali import fn, math, pipeline_def, types

        def uniform(middle: float, width: float):
            return fn.random.uniform(range=(middle - width, middle + width))

        def chance(probability: float):
            return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

        def crop(image):
            return fn.random_resized_crop(image, size=SIZE, random_area=SCALE, random_aspect_ratio=RATIO)

        def view(image, blur: float, solarize: float):
            image = crop(image)
            if chance(JITTER_PROBABILITY):
                brightness, contrast, saturation = (uniform(1.0, width) for width in JITTER[:3])
                image = fn.color_twist(
                    image,
                    brightness=brightness,
                    contrast=contrast,
                    saturation=saturation,
                    hue=uniform(0.0, 360 * JITTER[3]),
                )
            if chance(GRAY_PROBABILITY):
                image = fn.color_twist(image, saturation=0.0)
            if chance(blur):
                image = fn.gaussian_blur(image, sigma=fn.random.uniform(range=SIGMA))
            if chance(solarize):
                image = fn.cast(math.min(image, 255 - image), dtype=types.UINT8)  # inverts from 128 on
            mean, std = ([255 * value for value in values] for values in (MEAN, STD))
            flip = fn.random.coin_flip(probability=0.5)
            return fn.crop_mirror_normalize(image, mirror=flip, mean=mean, std=std, output_layout="CHW")

        @pipeline_def(batch_size=self.batch, num_threads=1, device_id=None, enable_conditionals=True)
        def graph():
            files, _ = fn.readers.file(files=self.paths, random_shuffle=task == "loader", name="files")
            image = fn.decoders.image(files)
            if task == "crops":
                return crop(image), crop(image)
            return view(image, *VIEWS[0]), view(image, *VIEWS[1])

        pipeline = graph()
        pipeline.build()
        return pipeline

    def items(self, task: str) -> Iterator[Pair]:
        pipeline = self.keep(task, lambda: self.pipeline(task))
        for _ in range(-(-len(self.paths) // self.batch)):
            yield tuple(torch.as_tensor(view.as_array()) for view in pipeline.run())

    def loader(self) -> Iterator[Pair]:
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        def make():
            names = ["view_1", "view_2"]
            return DALIGenericIterator(self.pipeline("loader"), names, reader_name="files", auto_reset=True)

        for (views,) in self.keep("loader", make):
            yield views["view_1"], views["view_2"]


LIBRARIES: dict[str, type[Library]] = {
    "ours": Ours,
    "plain": Plain,
    "lightly": Lightly,
    "lightly-train": LightlyTrain,
    "stable-pretraining": StablePretraining,
    "timm": Timm,
    "albumentations": Albumentations,
    "albumentationsx": AlbumentationsX,
    "dali": Dali,
}
