"""Test classes that bind the common tests of transformers to the cases of `cases.py`. Start them with `run.py`."""

import copy
import json
import sys
import unittest
from pathlib import Path

import torch
from tests.test_backbone_common import BackboneTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor
from tests.test_training_mixin import TrainingTesterMixin
from torch import nn
from transformers.models.auto import modeling_auto


sys.path.insert(0, str(Path(__file__).parent))

from cases import CASES, Case

from mocov3_hf import MoCoV3Backbone, MoCoV3ForImageClassification, MoCoV3ForPreTraining


# The tests look up in these tables what kind of model a class is. `AutoModel.register` does not extend them.
KINDS = {
    MoCoV3Backbone: modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MoCoV3ForPreTraining: modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    MoCoV3ForImageClassification: modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}


class ModelTester:
    """The tiny configuration and the inputs of a case."""

    is_training = True

    def __init__(self, case: Case, **arguments):
        self.case, self.arguments = case, {**case.config_arguments, **arguments}
        for name, value in case.sizes.items():
            setattr(self, name, value)

    def get_config(self):
        return self.case.config_class(**copy.deepcopy(self.arguments))

    def images(self, batch_size: int) -> dict:
        return {"pixel_values": floats_tensor([batch_size, self.num_channels, self.image_size, self.image_size])}

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.images(self.batch_size)


def add_second_view(inputs: dict, model_class: type) -> dict:
    if model_class is MoCoV3ForPreTraining:
        inputs["pixel_values_2"] = inputs["pixel_values"].flip(-1)
    return inputs


def model_test(case: Case) -> type:
    class ModelTest(ModelTesterMixin, unittest.TestCase):
        all_model_classes = tuple(model for model in case.models if model is not MoCoV3Backbone)
        has_attentions = case.has_attentions
        model_tester = ModelTester(case)
        test_resize_embeddings = False  # images have no token embeddings
        # Otherwise the tests exempt models whose files have no copyright line of 2023 or later.
        test_can_init_all_missing_weights_before_2023 = True

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            return add_second_view(super()._prepare_for_class(inputs_dict, model_class, return_labels), model_class)

        def test_model_get_set_embeddings(self):
            """Without the table of token embeddings that the common test expects."""
            for model_class in self.all_model_classes:
                model, other = model_class(self.model_tester.get_config()), nn.Identity()
                assert isinstance(model.get_input_embeddings(), nn.Module)
                model.set_input_embeddings(other)
                assert model.get_input_embeddings() is other
                assert model.get_output_embeddings() is None

    return ModelTest


def backbone_test(case: Case) -> type:
    class BackboneTest(BackboneTesterMixin, unittest.TestCase):
        all_model_classes = (MoCoV3Backbone,)
        config_class = case.config_class
        has_attentions = case.has_attentions
        model_tester = ModelTester(case)

    return BackboneTest


class PartialConfigTester(ConfigTester):
    def create_and_test_config_to_json_string(self):
        """The JSON has complete sub-configurations, but the arguments of a case may name a part of their keys."""
        found = json.loads(self.config_class(**self.inputs_dict).to_json_string())
        for key, value in self.inputs_dict.items():
            if isinstance(value, dict):
                assert value.items() <= found[key].items()
            else:
                assert found[key] == value


def config_test(case: Case) -> type:
    class ConfigTest(unittest.TestCase):
        model_tester = ModelTester(case)  # the configuration tests look for it

        def test_config(self):
            arguments = copy.deepcopy(case.config_arguments)
            PartialConfigTester(self, case.config_class, False, case.config_attributes, **arguments).run_common_tests()

    return ConfigTest


def overfit_test(case: Case, model_class: type, batch_size: int) -> type:
    class OverfitTest(TrainingTesterMixin, unittest.TestCase):
        """Overfits a single batch. The common test knows text only, so the images are passed as its text batch."""

        model_tester = ModelTester(case, vocab_size=1)  # read but not used
        all_model_classes = (model_class,)
        training_overfit_batch_size = batch_size

        def _get_model_modality(self):
            return "text"

        def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
            inputs = add_second_view(self.model_tester.images(batch_size), model_class)
            if model_class is MoCoV3ForImageClassification:
                inputs["labels"] = torch.arange(batch_size) % self.model_tester.get_config().num_labels
            return {name: value.cpu() for name, value in inputs.items()}

    return OverfitTest


for case in CASES:
    for model in case.models:
        KINDS.get(model, modeling_auto.MODEL_MAPPING_NAMES)[case.config_class.model_type] = model.__name__
    bound = {"ConfigTest": config_test(case), "ModelTest": model_test(case)}
    if MoCoV3Backbone in case.models:
        bound["BackboneTest"] = backbone_test(case)
    for model, size in case.overfit.items():
        bound[f"{model.__name__}OverfitTest"] = overfit_test(case, model, size)
    for name, test in bound.items():
        test.__name__ = test.__qualname__ = f"{case.name}{name}"
        test.__module__ = __name__
        globals()[test.__name__] = test
del test  # pytest would collect the last class twice
