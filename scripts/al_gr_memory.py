"""Memory of importing and exporting AL-GR files of growing size, with defects planted.

Usage: python scripts/al_gr_memory.py FOLDER [--sizes-mb 100,5000] [--layout gr]      prints JSON

Each size is written on the fly below FOLDER, imported and exported by the command line, compared
with the original less its defects, and deleted. Memory is the peak of each kind of process.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scaling.plan import CLI
from scaling.watching import Peaks, Stage, Watch

BEFORE, AFTER = "当前用户的历史行为如下：", "，请预测用户在电商推荐场景后续行为的语义编码"
SYSTEM = "你是一个推荐系统，每个行为用三个词表示。"
MIB = 2**20


def main() -> None:
    """Prints one row for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes-mb", default="100,5000")
    parser.add_argument("--layout", choices=BLOCKS, default="gr")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes_mb.split(",")]
    folder = options.folder.resolve()
    rows = [measure(folder / str(size), options.layout, size) for size in sizes]
    print(json.dumps(rows, indent=1))


def measure(folder: Path, layout: str, size_mb: int) -> dict[str, Any]:
    """Import and export one generated file."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "raw").mkdir(parents=True)
    good, bad, digest = generate(folder / "raw/rows.csv", layout, size_mb * MIB)
    raw, inside, out = (str(folder / name) for name in ("raw", "in", "out"))
    words = ["import", raw, "--format", "al-gr", "version=final", f"output={inside}"]
    report, imported = watched("import", words, folder)
    _, exported = watched("export", ["export", inside, out], folder)
    back = digest_of(folder / "out/rows.csv")
    shutil.rmtree(folder)
    counted = sum(report["rows"].values()), sum(report["skipped"].values())
    if counted != (good, bad) or back != digest:
        raise SystemExit(f"{size_mb} MB: {counted} rows for {(good, bad)}, same: {back == digest}")
    return {
        "layout": layout,
        "input_mb": size_mb,
        "rows": good,
        "skipped": bad,
        "identical": True,
        "import": imported.figures(),
        "export": exported.figures(),
    }


def generate(path: Path, layout: str, size: int) -> tuple[int, int, str]:
    """Write blocks of rows up to a size; good rows, defects, digest of the file without them."""
    header, make = BLOCKS[layout]
    rng, good, bad, clean = np.random.default_rng(0), 0, 0, hashlib.sha256(header)
    lines = make(rng)
    body = "".join(lines).encode()
    with path.open("wb") as stream:
        stream.write(header)
        while stream.tell() < size:
            stream.write(body)
            stream.write(DEFECTS[layout])
            clean.update(body)
            good, bad = good + len(lines), bad + 1
    return good, bad, clean.hexdigest()


def gr_rows(rng: np.random.Generator) -> list[str]:
    """About 8 MB of GR rows."""
    codes = rng.integers(0, 8192, (5000, 100, 3)) + np.array([0, 8192, 16384])
    sids = [["".join(f"C{code}" for code in item) for item in row] for row in codes.tolist()]
    return [f"{SYSTEM},{BEFORE}{''.join(row[:-1])}{AFTER},{row[-1]}\n" for row in sids]


def embedding_rows(rng: np.random.Generator) -> list[str]:
    """About 8 MB of Item-EMB rows."""
    vectors = rng.standard_normal((3000, 512)).astype("<f4")
    texts = [base64.b64encode(one.tobytes()).decode() for one in vectors]
    return [f"i{number},{text}\n" for number, text in enumerate(texts)]


BLOCKS: dict[str, tuple[bytes, Callable[[np.random.Generator], list[str]]]] = {
    "gr": (b"system,user,answer\n", gr_rows),
    "item_emb": (b"item_id,feature\n", embedding_rows),
}
DEFECTS = {"gr": f"{SYSTEM},{BEFORE}C1C2{AFTER},C1\n".encode(), "item_emb": b"SFk9B,c2hvcnQ=\n"}


def watched(name: str, command: list[str], folder: Path) -> tuple[dict[str, Any], Peaks]:
    """Run a command of the CLI; what it prints as JSON, and what its processes held."""
    watch, out = Watch(), folder / f"{name}.json"
    stage = Stage(name, 0, "", is_done=lambda: False, is_at_work=lambda: False)
    watch.run([*CLI, "data", *command, "--json"], [stage], folder / f"{name}.log", out=out)
    return json.loads(out.read_text()), watch.peaks[name]


def digest_of(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as stream:
        found = hashlib.sha256()
        while block := stream.read(8 * MIB):
            found.update(block)
    return found.hexdigest()


if __name__ == "__main__":
    main()
