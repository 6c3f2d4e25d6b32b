# %% [markdown]
# # Where the decoder looks
#
# Each head of the conditional cross-attention reads one part of an object: an end of its box, or
# the middle (figure 1 of the paper). `draw_attention` draws that for the objects it finds.

# %%
import os
from pathlib import Path

from cdetr_fast import ConditionalDetrForObjectDetection, draw_attention
from cdetr_fast.demo import DEMO
from cdetr_fast.demo.scenes import draw_scene
from cdetr_fast.images.draw import contact_sheet

MODEL = os.environ.get("MODEL", DEMO)  # hub name or folder
IMAGE = os.environ.get("IMAGE")  # path or URL of a photograph; a drawn scene without
LAYER = int(os.environ.get("LAYER", "2"))  # decoder layer; -1 is the last
SIZE = int(os.environ.get("SIZE", "320"))  # longer side of each picture in pixels
OUTPUT = Path(os.environ.get("OUTPUT", "build/examples"))

# %%
model = ConditionalDetrForObjectDetection.from_pretrained(MODEL)
image = IMAGE or draw_scene(seed=4, size=(384, 384))[0]
print(model.predict(image, threshold=0.5))

# %% [markdown]
# One row per object, one picture per head. The rectangle is the predicted box, the dot the query's
# reference point.

# %%
rows = draw_attention(model, image, threshold=0.5, layer=LAYER, size=SIZE)
if not rows:
    raise SystemExit("nothing found: try another image, or a lower threshold")
sheet = contact_sheet([picture for row in rows for picture in row], columns=len(rows[0]))

# %%
OUTPUT.mkdir(parents=True, exist_ok=True)
sheet.save(OUTPUT / "attention.png")
print("attention maps:", OUTPUT / "attention.png")
