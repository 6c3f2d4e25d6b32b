"""transformers' pipelines and auto classes with our models, by object and by folder."""

import subprocess
import sys

import pytest
import torch
from support.tiny import randomized, tiny_config

import cdetr_fast
from cdetr_fast.demo.scenes import draw_scene

transformers = pytest.importorskip("transformers")

SIZE = {"shortest_edge": 64, "longest_edge": 96}
MODELS = {
    "object-detection": "ConditionalDetrForObjectDetection",
    "image-segmentation": "ConditionalDetrForSegmentation",
    "image-feature-extraction": "ConditionalDetrModel",
}
OPTIONS = {"object-detection": {"threshold": 0.0}, "image-segmentation": {"threshold": 0.0}}
PROCESSORS = {
    "ours": cdetr_fast.ConditionalDetrImageProcessor,
    "theirs": transformers.ConditionalDetrImageProcessor,
}


def make(task):
    model = getattr(cdetr_fast, MODELS[task])(tiny_config(compat="transformers"))
    return randomized(model)


def plain(found):
    """Return a result without its masks, which are pictures."""
    if isinstance(found, list):
        return [plain(item) for item in found]
    if not isinstance(found, dict):
        return found
    return {key: value for key, value in found.items() if key != "mask"}


def close(got, expected):
    if isinstance(got, list):
        return len(got) == len(expected) and all(map(close, got, expected))
    if isinstance(got, dict):
        return got.keys() == expected.keys() and all(close(got[k], expected[k]) for k in got)
    if isinstance(got, float):
        return got == pytest.approx(expected, abs=1e-4)
    return got == expected


@pytest.fixture(scope="module")
def image():
    return draw_scene(seed=1)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for task in MODELS:
        folders[task] = tmp_path_factory.mktemp(task)
        make(task).save_pretrained(folders[task])
        cdetr_fast.ConditionalDetrImageProcessor(size=SIZE, compat="transformers").save_pretrained(
            folders[task]
        )
    return folders


@pytest.fixture(scope="module")
def expected(folders, image):
    """Return the results with the classes of transformers."""
    return {
        task: plain(
            transformers.pipeline(task, str(folder), device="cpu")(image, **OPTIONS.get(task, {}))
        )
        for task, folder in folders.items()
    }


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("task", MODELS)
def test_by_object(task, fast, processor, image, expected):
    model = make(task)
    pipeline = transformers.pipeline(
        task,
        model=cdetr_fast.optimize(model) if fast else model,
        image_processor=PROCESSORS[processor](size=SIZE),
        device="cpu",
    )
    if processor == "ours":
        pipeline.image_processor.compat = "transformers"
    assert close(plain(pipeline(image, **OPTIONS.get(task, {}))), expected[task])
    several = pipeline([image, image], batch_size=2, **OPTIONS.get(task, {}))
    assert close(plain(several), [expected[task]] * 2)


@pytest.fixture
def _registered():
    cdetr_fast.register_auto_classes()
    yield
    cdetr_fast.unregister_auto_classes()


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("task", MODELS)
def test_by_folder(task, folders, image, expected):
    pipeline = transformers.pipeline(task, str(folders[task]), device="cpu")
    assert type(pipeline.model) is getattr(cdetr_fast, MODELS[task])
    assert type(pipeline.image_processor) is cdetr_fast.ConditionalDetrImageProcessor
    assert close(plain(pipeline(image, **OPTIONS.get(task, {}))), expected[task])


AUTO = {
    "AutoConfig": "ConditionalDetrConfig",
    "AutoImageProcessor": "ConditionalDetrImageProcessor",
    "AutoModel": "ConditionalDetrModel",
    "AutoModelForObjectDetection": "ConditionalDetrForObjectDetection",
}


def loaded(folder, name, **kwargs):
    return getattr(transformers, name).from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("name", AUTO)
@pytest.mark.filterwarnings("ignore:.*not all weights")
def test_registered_and_not(name, folders):
    folder = folders["object-detection"]
    cdetr_fast.register_auto_classes()
    try:
        cdetr_fast.register_auto_classes()
        assert type(loaded(folder, name)) is getattr(cdetr_fast, AUTO[name])
    finally:
        cdetr_fast.unregister_auto_classes()
    assert type(loaded(folder, name)).__module__.startswith("transformers.")
    cdetr_fast.unregister_auto_classes()


@pytest.mark.usefixtures("_registered")
def test_arguments_of_auto_classes_are_honoured(folders):
    folder = folders["object-detection"]
    model = loaded(
        folder, "AutoModelForObjectDetection", attn_implementation="eager", dtype=torch.bfloat16
    )
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16
    config = cdetr_fast.ConditionalDetrConfig.from_pretrained(folder, dropout=0.7)
    model = loaded(folder, "AutoModelForObjectDetection", config=config)
    assert model.config.dropout == 0.7
    built = transformers.AutoModelForObjectDetection.from_config(config)
    assert type(built) is cdetr_fast.ConditionalDetrForObjectDetection


def test_what_was_registered_before_is_restored(folders):
    class Mine(cdetr_fast.ConditionalDetrForObjectDetection):
        pass

    entries = transformers.AutoModelForObjectDetection._model_mapping._extra_content
    transformers.AutoModelForObjectDetection.register(
        cdetr_fast.ConditionalDetrConfig, Mine, exist_ok=True
    )
    try:
        cdetr_fast.register_auto_classes()
        cdetr_fast.unregister_auto_classes()
        assert entries[cdetr_fast.ConditionalDetrConfig] is Mine
    finally:
        del entries[cdetr_fast.ConditionalDetrConfig]


def test_register_of_transformers_takes_our_processor():
    mapping = transformers.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING
    processor = cdetr_fast.ConditionalDetrImageProcessor
    transformers.AutoImageProcessor.register(
        cdetr_fast.ConditionalDetrConfig, slow_image_processor_class=processor, exist_ok=True
    )
    try:
        assert mapping[cdetr_fast.ConditionalDetrConfig]["pil"] is processor
    finally:
        del mapping._extra_content[cdetr_fast.ConditionalDetrConfig]


SCRIPT = """
import sys, copy, pickle
sys.path[:0] = {path!r}
from cdetr_fast import *
from cdetr_fast.models.outputs import DecoderOutput
output, config = DecoderOutput(), ConditionalDetrConfig(use_pretrained_backbone=False)
assert "transformers" not in sys.modules
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import ModelOutput
ConditionalDetrImageProcessor()
assert isinstance(config, PreTrainedConfig)
assert isinstance(output, ModelOutput)
assert issubclass(ConditionalDetrForObjectDetection, PreTrainedModel)
assert issubclass(ConditionalDetrImageProcessor, BaseImageProcessor)
assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
"""


@pytest.mark.slow
def test_bases_come_when_transformers_is_imported_last():
    """In another process, as in this one transformers was there first."""
    subprocess.run([sys.executable, "-c", SCRIPT.format(path=sys.path)], check=True)
