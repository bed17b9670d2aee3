"""An extraction for test_features.py, started as a process of its own.

`python extract_target.py PICTURES FOLDER`: PICTURES is a folder of PNG files. It says after every block how far
it is, and waits a moment to be killed.
"""

import json
import sys
import time
from pathlib import Path

from finematch.data.record import Record
from finematch.features import regions
from finematch.features.backbones import timm_backbone
from finematch.features.regions import extract

regions.BLOCK = 3


def records(folder: Path) -> list[Record]:
    return [Record(p.stem, "train", (f"caption of {p.stem}",), image=p) for p in sorted(folder.glob("*.png"))]


def run(pictures: Path, folder: Path, echo=None):
    backbone = timm_backbone("test_resnet", size=64)
    return extract(records(pictures), backbone, folder, "train", kind="regions", regions=12,
                   proposals="selective_search", echo=echo)  # fmt: skip


if __name__ == "__main__":
    from finematch.features import blockwise

    write_text = blockwise.write_text

    def slowly(path, text):
        write_text(path, text)
        print("block", json.loads(text)["done"], flush=True)
        time.sleep(0.5)

    blockwise.write_text = slowly
    run(Path(sys.argv[1]), Path(sys.argv[2]))
