# %% [markdown]
# # ONNX Runtime without torch
#
# Export once, where torch is; detect anywhere else with numpy, Pillow and ONNX Runtime. The code
# before and after the network is `detect_numpy.py`, a file to copy.

# %%
import os
import subprocess
import sys
from pathlib import Path

from detect_numpy import Detector  # type: ignore[import-not-found]  # the file beside this one

MODEL = os.environ.get("MODEL", "")  # hub name or folder; the demo's checkpoint without
OUTPUT = Path(os.environ.get("OUTPUT", "build/examples/onnx"))  # an export here is used again
IMAGE = os.environ.get("IMAGE", OUTPUT / "scene.png")  # path of a photograph

# %% [markdown]
# The export, in a process of its own: this one never imports torch. `cdetr-fast export` does the
# same from the shell.

# %%
EXPORT = """
import sys
from pathlib import Path
import torch
from cdetr_fast import ConditionalDetrForObjectDetection
from cdetr_fast.demo import DEMO
from cdetr_fast.demo.scenes import draw_scene
from cdetr_fast.inference.export import export

checkpoint, folder = sys.argv[1] or DEMO, Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
model = ConditionalDetrForObjectDetection.from_pretrained(checkpoint, dtype=torch.float32).eval()
model.config.save_pretrained(folder)
model.image_processor.save_pretrained(folder)
export(model, folder / "model.onnx", "onnx", size=(128, 160))  # to try; all sizes stay open
draw_scene(seed=4, size=(384, 384))[0].save(folder / "scene.png")
"""
if not (OUTPUT / "model.onnx").exists():
    subprocess.run([sys.executable, "-c", EXPORT, MODEL, str(OUTPUT)], check=True)

# %%
detector = Detector(OUTPUT)
found = detector(IMAGE, threshold=0.5)
for score, label, (left, top, right, bottom) in zip(*found, strict=True):
    name = detector.id2label[int(label)]
    print(f"{score:.2f} {name} at {left:.0f}, {top:.0f}, {right - left:.0f} x {bottom - top:.0f}")
print("torch was imported:", "torch" in sys.modules)
