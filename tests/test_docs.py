"""The code blocks of the documentation: run as they stand, or marked with the reason why not."""

import importlib.util
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.tiny import randomized, tiny_config

from cdetr_fast import ConditionalDetrForSegmentation, ConditionalDetrImageProcessor, cli
from cdetr_fast.demo import DEMO
from cdetr_fast.demo.scenes import CLASSES, draw_scene, write_coco_dataset

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
GENERATED = {"output", "build"}
# A reason stands alone on the line above its block: <!-- not run: needs the model hub -->
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `reason` is why it is not run, or None."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("code")) + 1,
            found["language"],
            found["code"],
            found["reason"],
        )
        for found in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files that the documentation names."""
    folder = tmp_path_factory.mktemp("docs")
    draw_scene(1, (96, 128))[0].save(folder / "photo.jpg")
    write_coco_dataset(folder / "folder", range(2), (96, 128))
    (folder / "folder" / "annotations.json").unlink()
    for split, seeds in (("train", range(4)), ("val", range(4, 6)), ("test", range(6, 8))):
        annotations = write_coco_dataset(folder / "data" / split, seeds, (64, 80))
        annotations.rename(folder / "data" / f"instances_{split}.json")
    shutil.copytree(DEMO, folder / "runs" / "first" / "best")
    masks = randomized(ConditionalDetrForSegmentation(tiny_config()))
    masks.save_pretrained(folder / "runs" / "masks" / "best")
    ConditionalDetrImageProcessor(size={"shortest_edge": 96}).save_pretrained(
        folder / "runs" / "masks" / "best"
    )
    (folder / "voc").mkdir()
    for seed in range(4):
        image, truth = draw_scene(seed, (64, 80))
        image.save(folder / "voc" / f"{seed}.png")
        (folder / "voc" / f"{seed}.xml").write_text(voc_annotation(truth))
    return folder


def voc_annotation(truth: dict[str, Any]) -> str:
    """Return the annotation of a drawn scene as Pascal VOC's tools write it."""
    objects = [
        f"<object><name>{CLASSES[label]}</name><bndbox>"
        + "".join(
            f"<{name}>{side:.0f}</{name}>"
            for name, side in zip(("xmin", "ymin", "xmax", "ymax"), box_xyxy, strict=True)
        )
        + "</bndbox></object>"
        for label, box_xyxy in zip(truth["labels"], truth["boxes_xyxy"], strict=True)
    ]
    size = "<size><width>80</width><height>64</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def test_blocks_were_found():
    languages = {block.language for block in BLOCKS if block.reason is None}
    assert {"python", "bash"} <= languages
    fences = [re.findall(r"^```", page.read_text("utf-8"), re.MULTILINE) for page in PAGES]
    assert 2 * len(BLOCKS) == sum(map(len, fences))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_benchmarks_that_a_page_names_exist(page):
    """Paths in backticks from the root, or of a package, and `python -m benchmarks...`."""
    text = page.read_text(encoding="utf-8")
    roots = (ROOT, ROOT / "kernels", ROOT / "cdetr_fast")
    paths = re.findall(r"`((?:[a-z]\w*/)+[\w./-]*\w)(?:::\w+)?`", text)
    folders = {path.name for root in roots for path in root.iterdir() if path.is_dir()}
    ours = [path for path in paths if path.split("/")[0] in folders - GENERATED]
    assert [p for p in ours if not any((root / p).exists() for root in roots)] == []
    for name in re.findall(r"python -m benchmarks ([a-z]\w*)(?=[ `])", text):
        files = (ROOT / "benchmarks" / f"{name}.py", ROOT / "benchmarks/suite" / f"{name}.py")
        assert any(file.exists() for file in files), name
    for module in re.findall(r"python -m (benchmarks\.[a-z][a-z.]*[a-z])", text):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_runs_or_says_why_not(block, workplace, monkeypatch):
    assert block.language in ("python", "bash", "text", "yaml", "json", "diff"), (
        "name the language of the block: python and bash are run, text is not"
    )
    if block.reason is not None:
        assert len(block.reason.split()) >= 2, "give the reason why the block is not run"
        return
    monkeypatch.chdir(workplace)
    if block.language == "python":
        # Blank lines in front make a traceback show the page's own line numbers.
        code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
        exec(code, {"__name__": "docs"})
    elif block.language == "bash":
        # In this process: starting one and importing torch takes seconds.
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                assert words[0] == "cdetr-fast", "mark the block: only cdetr-fast is run here"
                with pytest.raises(SystemExit) as stop:
                    cli.main(words[1:])
                assert not stop.value.code
    elif block.language == "json":
        json.loads(block.code)
