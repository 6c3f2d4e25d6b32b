# %% [markdown]
# # Convergence on a CPU
#
# The paper's point: attention that knows where to look learns fast. A new transformer on the
# demo's frozen backbone learns to detect from a few hundred drawn scenes; AP leaves zero within a
# few epochs. Plain DETR on the same scenes is in `python -m benchmarks.convergence`, and its
# figures in "Train on your data", "Zero AP". Needs `pip install 'cdetr-fast[train]'`.

# %%
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from cdetr_fast import ConditionalDetrForObjectDetection
from cdetr_fast.demo import DEMO
from cdetr_fast.demo.scenes import TRAIN_SEED, write_coco_dataset
from cdetr_fast.training import TrainingConfig, train
from cdetr_fast.training.run.log import read_rows

SCENES = int(os.environ.get("SCENES", "512"))  # for training; AP is of others
EPOCHS = int(os.environ.get("EPOCHS", "40"))
COMPAT = os.environ.get("COMPAT", "paper")  # transformers: its initial weights, a slower start
DEVICE = os.environ.get("DEVICE", "cpu")  # or auto
OUTPUT = Path(os.environ.get("OUTPUT", "build/examples/convergence"))

# %% [markdown]
# Scenes, and the backbone alone out of the demo's checkpoint.

# %%
train_set = write_coco_dataset(OUTPUT / "train", range(TRAIN_SEED, TRAIN_SEED + SCENES))
val_set = write_coco_dataset(OUTPUT / "val", range(max(4, SCENES // 4)))
demo = ConditionalDetrForObjectDetection.from_pretrained(DEMO, dtype=torch.float32)
save_file(demo.model.backbone.model.state_dict(), OUTPUT / "backbone.safetensors")

# %% [markdown]
# Everything else starts from random weights. Run again, it continues where it stopped.

# %%
config = TrainingConfig(
    train_annotations=str(train_set),
    val_annotations=str(val_set),
    output=str(OUTPUT / COMPAT),
    resume=True,
    backbone_weights=str(OUTPUT / "backbone.safetensors"),
    model_options={
        "backbone_config": demo.config.backbone_config.to_dict(),
        "compat": COMPAT,
        "num_queries": 30,
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 4,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 512,
        "decoder_ffn_dim": 512,
        "dropout": 0.0,
    },
    epochs=EPOCHS,
    batch_size=8,
    learning_rate=3e-4,
    backbone_learning_rate=0.0,  # frozen
    schedule="cosine",
    warmup_steps=100,
    scales=(128,),
    eval_size=128,
    max_size=128,
    crop_probability=0.0,
    vertical_flip_probability=0.5,
    num_workers=0,
    evaluate_every=2,
    sample_pictures=0,
    device=DEVICE,
)
train(config)

# %% [markdown]
# ## AP over epochs
#
# The curve, and those of all losses, are in `report.html`.

# %%
rows = [row for row in read_rows(OUTPUT / COMPAT / "metrics.jsonl") if row["kind"] == "eval"]
for row in rows:
    print(f"epoch {row['epoch']:3d}  AP {row['AP']:.3f}  " + "#" * round(100 * row["AP"]))
for level in (0.01, 0.1, 0.2, 0.3):
    first = next((row["epoch"] for row in rows if row["AP"] >= level), None)
    print(f"AP {level}:", "not reached" if first is None else f"epoch {first}")
print("report:", OUTPUT / COMPAT / "report.html")
