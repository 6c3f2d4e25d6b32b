# %% [markdown]
# # The operators alone
#
# `cdetr_kernels` knows nothing of models: functions of tensors, each with gradients, for any
# network that attends by content and position or turns queries into detections. Here three are
# compared with their definitions in a few lines of PyTorch, the attention in double precision.

# %%
import os

import torch
from torch import Tensor
from torchvision.ops import box_convert

from cdetr_kernels import conditional_attention, conditional_attention_separable, detection_topk
from cdetr_kernels.registry import report

DEVICE = os.environ.get("DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
DTYPE = getattr(torch, os.environ.get("DTYPE", "float32"))  # float32, float16 or bfloat16
BACKEND = os.environ.get("BACKEND", "auto")  # of attention; torch or triton, or it is refused
BATCH = int(os.environ.get("BATCH", "2"))
QUERIES = int(os.environ.get("QUERIES", "300"))
HEADS, SIZE = 8, 32  # of each half of a head
HEIGHT, WIDTH = 25, 34  # the map of an image of 800x1066 pixels

generator = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    values = torch.randn(shape, generator=generator)
    return values.to(DEVICE, DTYPE).requires_grad_()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).abs().max())


# %% [markdown]
# ## Conditional attention
#
# A score is the sum of a content and a spatial product; the two are never concatenated. A padded
# key gets no weight.

# %%
keys = HEIGHT * WIDTH
inputs = (
    random(BATCH, QUERIES, HEADS, SIZE),  # q_content
    random(BATCH, QUERIES, HEADS, SIZE),  # q_spatial
    random(BATCH, keys, HEADS, SIZE),  # k_content
    random(BATCH, keys, HEADS, SIZE),  # k_spatial
    random(BATCH, keys, HEADS, SIZE),  # value
)
key_mask = torch.ones(BATCH, keys, dtype=torch.bool, device=DEVICE)
key_mask[-1, keys // 2 :] = False  # the second half of the last image is padding


def definition(
    q_content: Tensor, q_spatial: Tensor, k_content: Tensor, k_spatial: Tensor, value: Tensor
) -> Tensor:
    score = torch.einsum("bqnd,bsnd->bnqs", q_content, k_content)
    score = score + torch.einsum("bqnd,bsnd->bnqs", q_spatial, k_spatial)
    score = score / (2 * SIZE) ** 0.5
    weights = score.masked_fill(~key_mask[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("bnqs,bsnd->bqnd", weights, value)


output = conditional_attention(*inputs, key_mask, backend=BACKEND)
assert isinstance(output, Tensor)
exact = tuple(x.detach().double().requires_grad_() for x in inputs)
expected = definition(*exact)
print(f"conditional_attention: output within {error(output, expected):.0e}")

weight = torch.randn(output.shape, generator=generator).to(DEVICE)
gradients = torch.autograd.grad((output.float() * weight).sum(), inputs)
wanted = torch.autograd.grad((expected * weight).sum(), exact)
worst = max(error(x, y) for x, y in zip(gradients, wanted, strict=True))
print(f"conditional_attention: gradients within {worst:.0e}")

# %% [markdown]
# ## The same on a map
#
# Where the spatial key of a place is that of its row plus that of its column, as sine codes are,
# no tensor of spatial keys is needed at all.

# %%
rows, columns = random(BATCH, HEIGHT, HEADS, SIZE), random(BATCH, WIDTH, HEADS, SIZE)
q_content, q_spatial, k_content, _, value = inputs
output = conditional_attention_separable(
    q_content, q_spatial, k_content, rows, columns, value, key_mask, backend=BACKEND
)
assert isinstance(output, Tensor)
k_spatial = (rows.double()[:, :, None] + columns.double()[:, None]).flatten(1, 2)
expected = definition(exact[0], exact[1], exact[2], k_spatial, exact[4])
print(f"conditional_attention_separable: output within {error(output, expected):.0e}")

# %% [markdown]
# ## From queries to detections
#
# The best pairs of query and class, without sorting all, and their boxes in pixels.

# %%
logits = torch.randn(BATCH, QUERIES, 91, generator=generator).to(DEVICE)
boxes_cxcywh = torch.rand(BATCH, QUERIES, 4, generator=generator).to(DEVICE)
scores, labels, boxes_xyxy, query = detection_topk(
    logits, boxes_cxcywh, target_sizes=[(480, 640)] * BATCH, k=100
)
best, index = logits.flatten(1).topk(100)
chosen = boxes_cxcywh.gather(1, (index // 91)[..., None].expand(-1, -1, 4))
expected = box_convert(chosen, "cxcywh", "xyxy") * torch.tensor([640, 480, 640, 480], device=DEVICE)
assert (query == index // 91).all()
assert (labels == index % 91).all()
worst = max(error(scores, best.sigmoid()), error(boxes_xyxy, expected))
print(f"detection_topk: the same detections, scores and pixels within {worst:.0e}")

# %% [markdown]
# ## What ran
#
# The path that "auto" takes on this device; `cdetr-fast info` also says why.

# %%
for choice in report(DEVICE):
    print(f"{choice.op}: {choice.path}")
