# %% [markdown]
# # Fine-tuning on a folder of one's own
#
# What `cdetr-fast train` and `cdetr-fast evaluate` do, from Python: a checkpoint gets a head for
# new classes, trains, and is scored with a report to look at. Needs `pip install
# 'cdetr-fast[train]'`.
#
# `DATA` is a folder with `train` and `val`, each with images and their COCO `annotations.json`; or
# an export of Roboflow (COCO, YOLO or VOC, with `train` and `valid`).

# %%
import json
import os
from pathlib import Path

from cdetr_fast import ConditionalDetrForObjectDetection
from cdetr_fast.demo import DEMO
from cdetr_fast.demo.scenes import write_coco_dataset
from cdetr_fast.images.load import image_files
from cdetr_fast.training import TrainingConfig, evaluate, train

DATA = os.environ.get("DATA")  # the folder; drawn scenes of two new classes without
MODEL = os.environ.get("MODEL", str(DEMO))  # hub name or folder to start from
SCENES = int(os.environ.get("SCENES", "256"))  # how many are drawn
EPOCHS = int(os.environ.get("EPOCHS", "6"))  # think in steps: photographs need thousands
SIZE = int(os.environ.get("SIZE", "128"))  # shorter side in pixels; 800 for COCO's checkpoints
BATCH = int(os.environ.get("BATCH", "8"))
DEVICE = os.environ.get("DEVICE", "auto")  # or cpu
OUTPUT = Path(os.environ.get("OUTPUT", "build/examples/fine_tune"))

# %% [markdown]
# Without a folder: scenes of the demo, whose six shapes become two classes that the checkpoint
# does not know.

# %%
ROUND = ("circle", "ring")


def draw(folder: Path, seeds: range) -> None:
    path = write_coco_dataset(folder, seeds, (128, 128))
    content = json.loads(path.read_text("utf-8"))
    is_round = {item["id"]: item["name"] in ROUND for item in content["categories"]}
    for annotation in content["annotations"]:
        annotation["category_id"] = 1 if is_round[annotation["category_id"]] else 2
    content["categories"] = [{"id": 1, "name": "round"}, {"id": 2, "name": "angular"}]
    path.write_text(json.dumps(content), "utf-8")


data = Path(DATA) if DATA else OUTPUT / "scenes"
if not DATA:
    draw(data / "train", range(SCENES))
    draw(data / "val", range(10_000, 10_000 + max(4, SCENES // 8)))

if (data / "train" / "annotations.json").exists():
    train_set = data / "train" / "annotations.json"
    val_set = data / "val" / "annotations.json"
else:
    train_set, val_set = data, data / "valid"

# %% [markdown]
# ## Train
#
# Fields are the flags of `cdetr-fast train --help`. Run again, it continues where it stopped.

# %%
config = TrainingConfig(
    train_annotations=str(train_set),
    val_annotations=str(val_set),
    model=MODEL,
    output=str(OUTPUT / "run"),
    resume=True,
    epochs=EPOCHS,
    batch_size=BATCH,
    learning_rate=2e-4,
    backbone_learning_rate=2e-5,
    schedule="cosine",
    scales=(SIZE,),
    eval_size=SIZE,
    max_size=SIZE * 5 // 3,
    crop_probability=0.0,
    num_workers=0,
    evaluate_every=max(1, EPOCHS // 3),
    device=DEVICE,
)
result = train(config)
print(f"AP {result['AP']:.3f}, AP50 {result['AP50']:.3f} after {result['step']} steps")

# %% [markdown]
# ## Evaluate
#
# The page has curves, classes, confusion and the worst images side by side.

# %%
best = OUTPUT / "run" / "best"
scored = evaluate(
    best,
    val_set,
    output=OUTPUT / "evaluation",
    num_workers=0,
    device="cpu" if DEVICE == "cpu" else "auto",
)
assert scored is not None  # on the first process, the only one here
print({name: round(value, 3) for name, value in scored.stats.items()})
print("report:", OUTPUT / "evaluation" / "report.html")

# %% [markdown]
# ## Use

# %%
model = ConditionalDetrForObjectDetection.from_pretrained(best)
picture = image_files(val_set if val_set.is_dir() else val_set.parent, recursive=True)[0]
print(model.predict(picture, threshold=0.3))
