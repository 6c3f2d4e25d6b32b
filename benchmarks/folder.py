"""A folder of JPEG photographs to boxes on a CPU: images per second against transformers.

    python -m benchmarks.folder --threads 2 --images 100

transformers: its image processor, model (sdpa) and post-processing, an image at a time. Ours:
`predict` of a list of paths, with and without reading ahead in a thread, and of `optimize(model)`.
The detections have to agree before anything is reported.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers

import cdetr_fast
from benchmarks.measure import interleaved, print_table, save
from benchmarks.preprocessing import make_photo
from cdetr_fast.models import predict as prediction


def make_models(backbone: str):
    """transformers' model and ours with the same random weights; some queries are certain."""
    torch.manual_seed(0)
    config = transformers.ConditionalDetrConfig(
        backbone=backbone, use_timm_backbone=True, use_pretrained_backbone=False
    )
    theirs = transformers.ConditionalDetrForObjectDetection(config).eval()
    with torch.no_grad():
        theirs.model.query_position_embeddings.weight.normal_()
        theirs.class_labels_classifier.weight.normal_(std=0.1)
    ours = cdetr_fast.ConditionalDetrForObjectDetection(
        cdetr_fast.ConditionalDetrConfig.from_dict(config.to_dict())
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def transformers_call(model, size: dict[str, int], paths: list[str], threshold: float):
    processor = transformers.ConditionalDetrImageProcessor(size=size)

    @torch.inference_mode()
    def call() -> list[dict]:
        results = []
        for path in paths:
            image = transformers.image_utils.load_image(path)
            outputs = model(**processor(image, return_tensors="pt"))
            results += processor.post_process_object_detection(
                outputs, threshold, [(image.height, image.width)]
            )
        return results

    return call


def box_error(expected: dict, result) -> float:
    """Largest distance, in pixels, from a box to the nearest of its class among the results.

    Scores of random weights lie close together: their order, and who is the last, may differ.
    """
    if len(expected["scores"]) == 0:
        return 0.0 if len(result) == 0 else float("inf")
    clear = expected["scores"] > expected["scores"][-1] + 1e-4
    if not clear.any():
        return 0.0
    distance = (expected["boxes"][clear][:, None] - result.boxes_xyxy).abs().amax(dim=2)
    others = expected["labels"][clear][:, None] != result.labels
    return distance.masked_fill(others, float("inf")).amin(dim=1).max().item()


def in_turn(items):
    """In place of `prediction._ahead`: reads an image when the one before is done."""
    return items


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--edges", type=int, nargs=2, default=(800, 1333), help="after resizing")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threshold", type=float, default=0.0)
    parser.add_argument("--output", help="name of the file in benchmarks/results to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    theirs, ours = make_models(arguments.backbone)
    size = dict(zip(("shortest_edge", "longest_edge"), arguments.edges, strict=True))
    ours.image_processor = cdetr_fast.ConditionalDetrImageProcessor(size=size)
    fast = cdetr_fast.optimize(ours)
    ahead = prediction._ahead

    def in_turn_call():
        prediction._ahead = in_turn
        try:
            return ours.predict(paths, arguments.threshold)
        finally:
            prediction._ahead = ahead

    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, f"{i}.jpg")) for i in range(arguments.images)]
        photo = make_photo(None)
        for i, path in enumerate(paths):
            photo.rotate(i).save(path, quality=90)
        calls = {
            "transformers": transformers_call(theirs, size, paths, arguments.threshold),
            "cdetr_fast, nothing read ahead": in_turn_call,
            "cdetr_fast": lambda: ours.predict(paths, arguments.threshold),
            "cdetr_fast, optimize(model)": lambda: fast.predict(paths, arguments.threshold),
        }
        results = {}
        keeping = {
            name: lambda name=name, call=call: results.update({name: call()})
            for name, call in calls.items()
        }
        times = interleaved(keeping, arguments.repeats, warmup=0)
        found = sum(len(result["labels"]) for result in results["transformers"])
        if found == 0:
            print("--threshold: nothing is found above it, nothing is compared", file=sys.stderr)
            return 1
        error = max(
            box_error(expected, result)
            for name in list(calls)[1:]
            for expected, result in zip(results["transformers"], results[name], strict=True)
        )
        if error > 0.5:
            print(f"the boxes disagree by {error} pixels: nothing is reported", file=sys.stderr)
            return 1
    rows = [
        {
            "way": name,
            "images": arguments.images,
            "detections": found,
            **times[name],
            "images/s": 1e3 * arguments.images / times[name]["ms"],
            "speed-up": times["transformers"]["ms"] / times[name]["ms"],
            "max box error, px": error,
        }
        for name in calls
    ]
    print_table(rows)
    if arguments.output:
        print("written to", save(arguments.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
